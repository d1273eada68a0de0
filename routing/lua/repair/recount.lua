#!lua flags=allow-oom
-- Does: makes a worker's allocations the sum of the jobs it holds, and repairs its places in the indexes and its part
--   of the sums.
-- KEYS: none; by name: epoch, book, held, job, free, free_of, leases, view, allocated, allocated_cpus
-- ARGV: epoch, run_id, worker, counted (the sum of its jobs' amounts, as a shape; '': count here)
-- Replies: {ok, differed (number of fields)} | {unknown, differed} | {many} where it holds too much to be counted here
--   | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.held jobs are looked at, and four commands for each index of free CPUs in which the worker
--   stands
-- Repeat: harmless
local sums, strays = sum_held(worker, counted)
if not sums then
  return {'many'}
end
local different = strays
local book = read_book(worker, epoch)
if not book then
  -- Nothing may be admitted to a worker without a book.
  local removed = redis.call('ZREM', KEY.free, worker) + redis.call('ZREM', KEY.leases, worker)
  removed = removed + redis.call('ZREM', KEY.free_of .. 'memory', worker)
  return {'unknown', int(different + removed)}
end
local changed = {}
for name, allocated in pairs(book.allocated) do
  if allocated ~= (sums[name] or 0) then
    changed[name] = (sums[name] or 0) - allocated
    different = different + 1
  end
end
for name, sum in pairs(sums) do
  if not book.allocated[name] then
    changed[name] = sum
    different = different + 1
  end
end
-- A reserved book has no queue: its worker chooses its places when it registers.
local indexes = {KEY.free}
for _, name in ipairs(book.queue ~= '' and resources_of(book) or {}) do
  indexes[#indexes + 1] = KEY.free_of .. name
end
local before = {}
for i, index in ipairs(indexes) do
  before[i] = redis.call('ZSCORE', index, worker)
end
if #indexes > 1 then
  choose_places(book)
end
allocate(book, changed, 1)
write_book(book)
local moved = false
for i, index in ipairs(indexes) do
  moved = moved or redis.call('ZSCORE', index, worker) ~= before[i]
end
if different == 0 and moved then
  different = 1
end
local lease = redis.call('ZSCORE', KEY.leases, worker)
if not lease or tonumber(lease) ~= book.lease then
  redis.call('ZADD', KEY.leases, int(book.lease), worker)
  different = different + 1
end
return {'ok', int(different)}
