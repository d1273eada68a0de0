#!lua flags=allow-oom
-- Does: counts these jobs as use of their tenants, where they started before tenants were in use.
-- KEYS: none; by name: epoch, job, used
-- ARGV: epoch, run_id, then for each job: job
-- Replies: {ok, counted (number of jobs)} | {cold} | {epoch, current}
-- Cost: at most seven commands a job
-- Repeat: harmless: a job is counted once
local number = 0
for i = EACH.first, #ARGV, EACH.step do
  local id = ARGV[i + EACH.job]
  local job = facts.tenants and read_job(id)
  if job and not job.counted and (job.state == 'admitted' or job.state == 'running') then
    job.counted = '1'
    write_job(id, job)
    count_use(job.shape, 1)
    number = number + 1
  end
end
return {'ok', int(number)}
