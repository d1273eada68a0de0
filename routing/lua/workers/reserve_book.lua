#!lua flags=allow-oom
-- Does: gives a closed book to a worker that has not registered in this epoch, so that its allocations do not count as
--   free.
-- KEYS: none; by name: epoch, book, held, job, leases, free, free_of
-- ARGV: epoch, run_id, worker, incarnation, capacity (as a shape), labels (as in register.lua), counted (the sum of
--   its jobs' amounts, as a shape; '': count here)
-- Replies: {ok} | {open} where there is a book in this epoch | {many} where too much is held to be counted here
--   | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.held jobs are looked at, and a command for each index of free CPUs in which the worker
--   stood; nothing of that where the book is open
-- Repeat: harmless
if read_book(worker, epoch) then
  return {'open'}
end
local now, sums = clock(), sum_held(worker, counted)
if not sums then
  return {'many'}
end
-- A job whose own key was lost too leaves the list, as in register.lua.
-- The lease ends now, so the jobs of a dead worker are lost after the usual grace.
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
if labels ~= '' then
  fields[#fields + 1], fields[#fields + 2] = 'labels', labels
end
withdraw(worker)
redis.call('DEL', KEY.book .. worker)
redis.call('HSET', KEY.book .. worker, unpack(fields))
redis.call('ZADD', KEY.leases, int(now), worker)
return {'ok'}
