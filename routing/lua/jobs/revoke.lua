#!lua flags=allow-oom
-- Does: notes that a job held by a worker was revoked. Should the job come back, it ends, and a claim of it is told so.
-- KEYS: none; by name: epoch, job
-- ARGV: epoch, run_id, id (of the job)
-- Replies: {held, worker} | {free} (no worker holds it) | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
local job = read_job(id)
if not job or (job.state ~= 'admitted' and job.state ~= 'running') then
  return {'free'}
end
job.revoked = '1'
write_job(id, job)
return {'held', job.worker or ''}
