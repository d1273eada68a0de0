#!lua flags=allow-oom
-- Does: returns to a worker the jobs whose leases it has without knowing, because the reply of a release was lost.
-- KEYS: none; by name: epoch, book, held, job
-- ARGV: epoch, run_id, worker, incarnation, then for each job that the worker does not know of: job
-- Replies: {ok, then for each job: job, token, admitted, started, entry, losses, shape, rerun, submitted, message}
--   | {unknown} | {cold} | {epoch, current}
-- Cost: at most three commands a job
-- Repeat: harmless: the same jobs are returned again
if redis.call('HGET', KEY.book .. worker, 'incarnation') ~= incarnation then
  return {'unknown'}
end
local reply = {'ok'}
for i = EACH.first, #ARGV, EACH.step do
  local id = ARGV[i + EACH.job]
  local job = read_job(id)
  local mine = job and job.state == 'running' and redis.call('HGET', KEY.held .. worker, id) == token_of(job)
  local message = mine and message_of(id, job) or ''
  if message ~= '' then
    append_handed_over(reply, id, job, message)
  end
end
return reply
