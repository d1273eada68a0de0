#!lua flags=allow-oom
-- Does: stops admission to a worker, and hands back the named jobs that were admitted to it and not started.
-- KEYS: none; by name: epoch, book, held, job, unclaimed, counters, stream, wait, shapes, shapes_of, asks, free,
--   free_of, view, allocated, allocated_cpus, border, withheld, past, tenant_heads, totals, used
-- ARGV: epoch, run_id, worker, incarnation, then for each job (none at first, to stop admission before the list is
--   read): job
-- Replies: {ok, then for each job handed back: shape} | {unknown} | {cold} | {epoch, current}
-- Cost: at most fifteen commands a job, and a command for each index of free CPUs in which the worker stands
-- Repeat: harmless
local now = clock()
local book = read_book(worker, epoch)
if not book or book.incarnation ~= incarnation then
  return {'unknown'}
end
book.status = 'draining'
redis.call('HSET', KEY.book .. worker, 'status', 'draining')
if redis.call('EXISTS', KEY.view .. worker) == 1 then
  redis.call('HSET', KEY.view .. worker, 'status', 'draining')
end
local reply = {'ok'}
for i = EACH.first, #ARGV, EACH.step do
  local id = ARGV[i + EACH.job]
  local job = read_job(id)
  if job and job.state == 'admitted' and job.worker == worker and job.incarnation == incarnation then
    allocate(book, amounts_of(job.shape), -1)
    put_back(id, job, now, 'handed_back', '', '0')
    count('handed_back', 1)
    reply[#reply + 1] = job.shape
  end
end
write_book(book)
return reply
