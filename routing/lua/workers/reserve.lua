#!lua flags=allow-oom
-- Does: gives a worker that has not spoken in this epoch a closed book, so that what it holds is not taken for free.
-- KEYS: none; by name: epoch, book, held, job, leases, free, free_of
-- ARGV: epoch, run_id, worker, incarnation, capacity (as a shape), counted (the sum of what is held there, as a shape;
--   '': count here)
-- Replies: {ok} | {open} where there is a book in this epoch | {many} where too much is held to be counted here | {cold}
--   | {epoch, current}
-- Cost: at the worst LIMIT.held jobs are looked at: none, but where a book went missing
-- Repeat: harmless
local epoch, run_id, worker, incarnation, capacity = ARG.epoch, ARG.run_id, ARG.worker, ARG.incarnation, ARG.capacity
local counted = ARG.counted

local no = refused(epoch, run_id)
if no then
  return no
end
if read_book(worker, epoch) then
  return {'open'}
end
local now, sums, strays = clock(), sum_held(worker, counted)
if not sums then
  return {'many'}
end
-- (As in register.lua.)
for _, id in ipairs(strays) do
  redis.call('HDEL', KEY.held .. worker, id)
end
-- The lease begins to run out now: a worker that is dead is lost after the usual grace.
local fields = {'epoch', epoch, 'incarnation', incarnation, 'status', 'closed', 'queue', '', 'lease', int(now)}
for name, amount in pairs(amounts_of(capacity)) do
  fields[#fields + 1] = 'c.' .. name
  fields[#fields + 1] = int(amount)
  sums[name] = sums[name] or 0
end
for name, sum in pairs(sums) do
  fields[#fields + 1] = 'a.' .. name
  fields[#fields + 1] = int(sum)
end
withdraw(worker)
redis.call('DEL', KEY.book .. worker)
redis.call('HSET', KEY.book .. worker, unpack(fields))
redis.call('ZADD', KEY.leases, int(now), worker)
return {'ok'}
