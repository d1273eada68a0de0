#!lua flags=allow-oom
-- Does: closes the book of a worker that holds no job any more, and removes its private queue.
-- KEYS: none; by name: epoch, book, held, missing, view, leases, free, free_of
-- ARGV: epoch, run_id, worker, incarnation
-- Replies: {ok} | {held, number (of jobs)} | {unknown} | {cold} | {epoch, current}
-- Cost: constant, and a command for each index of free CPUs in which the worker stands
-- Repeat: harmless
local book = redis.call('HMGET', KEY.book .. worker, 'incarnation', 'queue')
if book[1] ~= incarnation then
  return {'unknown'}
end
local held = redis.call('HLEN', KEY.held .. worker)
if held > 0 then
  return {'held', int(held)}
end
withdraw(worker)
redis.call('UNLINK', KEY.book .. worker, KEY.missing .. worker, KEY.view .. worker, book[2])
redis.call('ZREM', KEY.leases, worker)
return {'ok'}
