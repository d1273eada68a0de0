-- Does: gives a worker that has not spoken in this epoch a closed book, so that what it holds is not taken for free.
-- KEYS: none; by name: epoch, book, leases
-- ARGV: epoch, run_id, worker, incarnation, capacity (as a shape)
-- Replies: {ok} | {open} where the worker has spoken | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
local epoch, run_id, worker, incarnation, capacity = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

local no = refused(epoch, run_id)
if no then
  return no
end
if redis.call('EXISTS', KEY.book .. worker) == 1 then
  return {'open'}
end
-- The lease begins to run out now: a worker that is dead is lost after the usual grace.
local fields = {'epoch', epoch, 'incarnation', incarnation, 'status', 'closed', 'queue', '', 'lease', int(clock())}
for name, amount in pairs(amounts_of(capacity)) do
  fields[#fields + 1] = 'c.' .. name
  fields[#fields + 1] = int(amount)
  fields[#fields + 1] = 'a.' .. name
  fields[#fields + 1] = '0'
end
redis.call('HSET', KEY.book .. worker, unpack(fields))
redis.call('ZADD', KEY.leases, int(clock()), worker)
return {'ok'}
