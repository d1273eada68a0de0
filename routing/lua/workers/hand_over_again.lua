#!lua flags=allow-oom
-- Does: returns to a worker the jobs whose leases it has without knowing, because the reply of a release was lost.
-- KEYS: none; by name: epoch, book, held, job
-- ARGV: epoch, run_id, worker, incarnation, then for each job that the worker does not know of: job
-- Replies: {ok, then for each job: job, token, admitted, started, entry, losses, shape, rerun, message} | {unknown}
--   | {cold} | {epoch, current}
-- Cost: at most three commands a job
-- Repeat: harmless: the same jobs are returned again
local epoch, run_id, worker, incarnation = ARG.epoch, ARG.run_id, ARG.worker, ARG.incarnation

local no = refused(epoch, run_id)
if no then
  return no
end
if redis.call('HGET', KEY.book .. worker, 'incarnation') ~= incarnation then
  return {'unknown'}
end
local reply = {'ok'}
for i = EACH.first, #ARGV, EACH.step do
  local id = ARGV[i + EACH.job]
  local job = read_job(id)
  local mine = job and job.state == 'running' and redis.call('HGET', KEY.held .. worker, id) == token_of(job)
  local message = mine and redis.call('HGET', KEY.job .. id, 'message')
  if message then
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] = id, token_of(job), job.admitted, job.started
    reply[n + 5], reply[n + 6], reply[n + 7] = job.entry or '', job.losses or '0', job.shape
    reply[n + 8], reply[n + 9] = job.rerun or '', tagged(message, id, job)
  end
end
return reply
