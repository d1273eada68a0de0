#!lua flags=allow-oom
-- Does: ends the lease of an incarnation that is known to be dead, so that its jobs can be taken back at once.
-- KEYS: none; by name: epoch, book, leases, view, free, free_of
-- ARGV: epoch, run_id, worker, incarnation
-- Replies: {ok} | {unknown} | {cold} | {epoch, current}
-- Cost: constant, and a command for each index of free CPUs in which the worker stands
-- Repeat: harmless
if redis.call('HGET', KEY.book .. worker, 'incarnation') ~= incarnation then
  return {'unknown'}
end
redis.call('HSET', KEY.book .. worker, 'lease', '0', 'lapsed', '0', 'status', 'closed')
redis.call('ZADD', KEY.leases, '0', worker)
withdraw(worker)
redis.call('DEL', KEY.view .. worker)
return {'ok'}
