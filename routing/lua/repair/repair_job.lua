#!lua flags=allow-oom
-- Does: repairs the places of one job: in the list of its worker, with the book, and among the deliveries to come.
-- KEYS: none; by name: epoch, job, book, held, unclaimed, free, free_of, view, allocated, allocated_cpus
-- ARGV: epoch, run_id, id (of the job)
-- Replies: {ok, differed (number of places)} | {no_book, worker} where its worker has no book | {cold}
--   | {epoch, current}
-- Cost: constant, and a command for each index of free CPUs in which the worker stands
-- Repeat: harmless
local job, different = read_job(id), 0
if job and (job.state == 'admitted' or job.state == 'running') then
  local book = read_book(job.worker, epoch)
  if not book or book.incarnation ~= job.incarnation then
    return {'no_book', job.worker}
  end
  local token = redis.call('HGET', KEY.held .. job.worker, id)
  if token ~= token_of(job) then
    different = 1
    redis.call('HSET', KEY.held .. job.worker, id, token_of(job))
    if not token then
      allocate(book, amounts_of(job.shape), 1)
      write_book(book)
    end
  end
end
local due = redis.call('ZSCORE', KEY.unclaimed, id)
if job and job.state == 'admitted' and not due then
  redis.call('ZADD', KEY.unclaimed, int(clock() + LIMIT.start), id)
  different = different + 1
elseif due and not (job and job.state == 'admitted') then
  redis.call('ZREM', KEY.unclaimed, id)
  different = different + 1
end
return {'ok', int(different)}
