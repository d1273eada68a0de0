#!lua flags=allow-oom
-- Does: takes a job out of the ledger for reconcile, because Postgres has ended it, or because it is entered anew.
-- KEYS: none; by name: epoch, job, held, book, wait, shapes, shapes_of, unclaimed, free, free_of, view, allocated,
--   allocated_cpus, counters, stream, kept, tasks
-- ARGV: epoch, run_id, job, token (as reconcile read it), final (1: it may not come back, 0: it is entered anew)
-- Replies: {ok, worker} ('' when it was waiting) | {changed} | {cold} | {epoch, current}
-- Cost: constant, and a command for each index of free CPUs in which the worker stands; LIMIT.freed passes like that of
--   fill where a worker was kept for this job
-- Repeat: harmless
local epoch, run_id, id, token, final = ARG.epoch, ARG.run_id, ARG.job, ARG.token, ARG.final

local no = refused(epoch, run_id)
if no then
  return no
end
local job = read_job(id)
-- The ledger is ahead of Postgres on a job with an unapplied entry. Such a job is not wrong.
if not job or job.entry or job.state == 'ended' or token_of(job) ~= token then
  return {'changed'}
end
local worker = ''
if job.state == 'waiting' then
  redis.call('ZREM', KEY.wait .. job.shape, id)
  local freed = leave_queue(job.shape, epoch)
  if freed then
    fill_freed(freed, epoch, clock())
  end
else
  worker = job.worker
  redis.call('ZREM', KEY.unclaimed, id)
  local book = read_book(worker, epoch)
  if redis.call('HDEL', KEY.held .. worker, id) == 1 and book then
    local changed = {}
    for name, amount in pairs(amounts_of(job.shape)) do
      changed[name] = -amount
    end
    write_book(book, changed)
  end
end
if final == '1' then
  bury(id, job, nil, nil, true)
else
  redis.call('DEL', KEY.job .. id)
end
return {'ok', worker}
