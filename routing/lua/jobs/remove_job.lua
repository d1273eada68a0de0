#!lua flags=allow-oom
-- Does: takes a job out of the ledger for reconcile, because Postgres has ended it, or because it is entered anew.
-- KEYS: none; by name: epoch, job, held, book, wait, shapes, shapes_of, asks, unclaimed, free, free_of, view,
--   allocated, allocated_cpus, kept, border, low, past, tenant_heads, totals, used
-- ARGV: epoch, run_id, id (of the job), token (as reconcile read it), final (1: it may not come back, 0: it is entered
--   anew)
-- Replies: {ok, freed (the worker that held it, or was kept for it, and is to be filled; '': none)} | {changed}
--   | {cold} | {epoch, current}
-- Cost: constant, and a command for each index of free CPUs in which the worker stands
-- Repeat: harmless
local job = read_job(id)
-- The ledger is ahead of Postgres on a job with an unapplied entry. Such a job is not wrong.
if not job or job.entry or job.state == 'ended' or token_of(job) ~= token then
  return {'changed'}
end
local freed
if job.state == 'waiting' then
  unqueue(job.shape, id)
  freed = leave_queue(job.shape, epoch, facts)
else
  freed = job.worker
  redis.call('ZREM', KEY.unclaimed, id)
  local book = read_book(freed, epoch)
  if redis.call('HDEL', KEY.held .. freed, id) == 1 and book then
    allocate(book, amounts_of(job.shape), -1)
    write_book(book)
    redis.call('HSET', KEY.book .. freed, 'unfilled', '1')
  end
  if job.counted then
    give_use_back(job, clock())
  end
end
if final == '1' then
  bury(id, job, nil, nil, true)
else
  redis.call('DEL', KEY.job .. id)
end
return {'ok', freed}
