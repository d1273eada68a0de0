#!lua flags=allow-oom
-- Does: renews the lease of a worker and its view, and says if jobs that fit there may have been left waiting.
-- KEYS: none; by name: epoch, book, held, missing, view, leases, free, free_of, allocated, allocated_cpus, asks, tasks
-- ARGV: epoch, run_id, worker, incarnation, ttl (ms), then for each field of the view: name, value
-- Replies: {ok, undone (1: the caller fills the worker, if it may admit), held (number of jobs), lacked (1 where
--   earlier lists lacked some of these jobs, else 0)} | {unknown} | {cold} | {epoch, current}
-- Cost: constant, and two commands for each index of free CPUs in which the worker stands
-- Repeat: harmless
ttl = tonumber(ttl)
local now = clock()
local book = read_book(worker, epoch)
-- A reserved book has no queue: its worker has to register.
if not book or book.incarnation ~= incarnation or book.queue == '' then
  return {'unknown'}
end
-- A catalogue that is gone would keep all jobs from the worker: it registers again, with its tasks.
if book.tasks and redis.call('PEXPIRE', KEY.tasks .. book.tasks, LIMIT.catalogue) == 0 then
  return {'unknown'}
end
-- Whatever frees room or files a job fills it. That may be left undone: while nothing was admitted here, in a pass that
-- ended at a cursor, or where a worker is to be kept for a job that must be alone.
local undone = book.status == 'closed' or book.lease <= now or book.unfilled or book.kept
book.lease = now + ttl
-- A worker that the lapse closed, and that is alive after all, opens again.
if book.status == 'closed' then
  book.status = 'ready'
end
redis.call('HSET', KEY.book .. worker, 'lease', int(book.lease), 'status', book.status)
if book.lapsed then
  redis.call('HDEL', KEY.book .. worker, 'lapsed')
end
redis.call('ZADD', KEY.leases, int(book.lease), worker)
local view = {unpack(ARGV, EACH.first)}
view[#view + 1], view[#view + 2] = 'status', book.status
show(book, view)
redis.call('PEXPIRE', KEY.view .. worker, int(ttl))

choose_places(book)
write_book(book)
if undone and not book.unfilled then
  redis.call('HSET', KEY.book .. worker, 'unfilled', '1')
end
undone = undone or redis.call('ZCOUNT', KEY.asks .. 'cpus', '-inf', '(0') > 0
return {'ok', undone and '1' or '0', int(redis.call('HLEN', KEY.held .. worker)),
  int(redis.call('EXISTS', KEY.missing .. worker))}
