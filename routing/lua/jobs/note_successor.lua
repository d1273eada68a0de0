#!lua flags=allow-oom
-- Does: notes that Postgres holds a successor (retry, replace) of a job's attempt that is admitted or running.
-- KEYS: none; by name: job
-- ARGV: id (of the job), digest (of the successor's message)
-- Replies: {ok} | {missing} where there is no such attempt, or it is that of the successor itself: Postgres was quicker
-- Cost: constant
-- Repeat: harmless
local job = read_job(id)
if not job or (job.state ~= 'admitted' and job.state ~= 'running') or job.digest == digest then
  return {'missing'}
end
job.successor = '1'
write_job(id, job)
return {'ok'}
