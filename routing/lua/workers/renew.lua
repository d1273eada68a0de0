#!lua flags=allow-oom
-- Does: renews the lease of a worker and its view, and admits the jobs that fit.
-- KEYS: none; by name: epoch, book, held, missing, view, leases, free, free_of, allocated, allocated_cpus, job,
--   unclaimed, counters, stream, wait, shapes, shapes_of, kept, tasks
-- ARGV: epoch, run_id, worker, incarnation, ttl (ms), admit (1: go on to admit, 0: this caller may not), then for each
--   field of the view: name, value
-- Replies: {ok, admitted, cursor (of shapes), held (number of jobs), lacked (1 where earlier lists lacked some of these
--   jobs, else 0)} | {unknown} | {cold} | {epoch, current}
-- Cost: a pass like that of fill, and two commands for each index of free CPUs in which the worker stands
-- Repeat: harmless
local epoch, run_id, worker, incarnation = ARG.epoch, ARG.run_id, ARG.worker, ARG.incarnation
local ttl, admit = tonumber(ARG.ttl), ARG.admit

local no = refused(epoch, run_id)
if no then
  return no
end
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
if #ARGV >= EACH.first then
  redis.call('HSET', KEY.view .. worker, unpack(ARGV, EACH.first))
end
redis.call('HSET', KEY.view .. worker, 'status', book.status)
redis.call('PEXPIRE', KEY.view .. worker, int(ttl))

show(book)
choose_places(book)
write_book(book, {})
local admitted, cursor = 0, ''
if admit == '1' then
  admitted, cursor = fill(worker, epoch, now, '')
end
-- An earlier release kept a set here, without times.
local lacked = redis.call('TYPE', KEY.missing .. worker).ok
if lacked == 'set' then
  redis.call('UNLINK', KEY.missing .. worker)
end
return {'ok', int(admitted), cursor, int(redis.call('HLEN', KEY.held .. worker)), lacked == 'hash' and '1' or '0'}
