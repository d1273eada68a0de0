#!lua flags=allow-oom
-- Does: opens a worker's book with its capacity, or changes the capacity of this incarnation. The caller fills the
--   worker, if it may admit.
-- KEYS: none; by name: epoch, book, held, missing, view, leases, free, free_of, allocated, allocated_cpus, job,
--   tasks, cordons, totals, asked
-- ARGV: epoch, run_id, worker, incarnation, queue, ttl (ms), capacity (as a shape), tasks (catalogue of the tasks that
--   it has registered; '': it takes any), names (of these tasks, with blanks between), status (ready, or closed until
--   the worker has named the jobs it holds and renews), left (ms until the worker ends; '': no end is known), labels
--   (key=value with commas between; '': none), counted (the sum of its jobs' amounts, as a shape; '': count here), then
--   for each field of the view: name, value
-- Replies: {ok} | {taken, incarnation, lease_left (ms, negative when it ran out), held}
--   | {many} where too much is held to be counted here | {cold} | {epoch, current}
-- Cost: LIMIT.held jobs where the book went missing, two commands for each index of free CPUs
--   in which the worker stands, and one for each LIMIT.batch tasks of a new catalogue
-- Repeat: harmless: the same incarnation keeps its allocations
ttl = tonumber(ttl)
local now = clock()
local key = KEY.book .. worker
local before = redis.call('HMGET', key, 'incarnation', 'lease', 'queue')
if before[1] and before[1] ~= incarnation then
  local left, held = tonumber(before[2] or '0') - now, redis.call('HLEN', KEY.held .. worker)
  if left > 0 or held > 0 then
    return {'taken', before[1], int(left), int(held)}
  end
  withdraw(worker)
  redis.call('UNLINK', key, KEY.missing .. worker)
  if before[3] and before[3] ~= '' then
    redis.call('UNLINK', before[3])
  end
elseif not before[1] then
  -- The book is new, or went missing: a missing book is not a free worker.
  note_lost_book(worker)
  local sums = sum_held(worker, counted)
  if not sums then
    return {'many'}
  end
  for name, sum in pairs(sums) do
    redis.call('HSET', key, 'a.' .. name, int(sum))
  end
end
local old = redis.call('HGETALL', key)
for i = 1, #old, 2 do
  if string.sub(old[i], 1, 2) == 'c.' then
    redis.call('HDEL', key, old[i])
  end
end
local fields = {'epoch', epoch, 'incarnation', incarnation, 'status', status, 'queue', queue, 'lease', int(now + ttl)}
for name, amount in pairs(amounts_of(capacity)) do
  fields[#fields + 1] = 'c.' .. name
  fields[#fields + 1] = int(amount)
  redis.call('HSETNX', key, 'a.' .. name, '0')
end
if left ~= '' then
  fields[#fields + 1], fields[#fields + 2] = 'ends', int(now + tonumber(left))
end
redis.call('HSET', key, 'unfilled', '1', unpack(fields))
-- Until the runner of the duties tells the capacity of all workers, it is that of the first one: without any, the turns
-- of tenants would be equal, and the first fill would go to one of them.
if facts.tenants and redis.call('EXISTS', KEY.totals) == 0 then
  for name, amount in pairs(amounts_of(capacity)) do
    if is_counted(name) then
      redis.call('HSET', KEY.totals, name, int(amount))
    end
  end
end
redis.call('HDEL', key, 'lapsed')
-- A cordon outlives the incarnation of its worker.
local cordoned = redis.call('HGET', KEY.cordons, worker)
if cordoned then
  redis.call('HSET', key, 'cordoned', cordoned)
else
  redis.call('HDEL', key, 'cordoned')
end
if tasks == '' then
  redis.call('HDEL', key, 'tasks')
else
  keep_catalogue(tasks, names)
  redis.call('HSET', key, 'tasks', tasks)
end
if labels == '' then
  redis.call('HDEL', key, 'labels')
else
  redis.call('HSET', key, 'labels', labels)
end
redis.call('ZADD', KEY.leases, int(now + ttl), worker)
redis.call('DEL', KEY.view .. worker)
redis.call('HSET', KEY.view .. worker, unpack(ARGV, EACH.first))
redis.call('HSET', KEY.view .. worker, 'status', status)
redis.call('PEXPIRE', KEY.view .. worker, int(ttl))
redis.call('SET', KEY.allocated_cpus, cpus_text(redis.call('INCRBY', KEY.allocated, 0)))
local book = read_book(worker, epoch)
-- Capacity that shrank below the allocations is no error of the books. `shrunk` tells that to every check, until the
-- allocations fit again.
if over(book) then
  redis.call('HSET', key, 'shrunk', '1')
end
show(book, {})
choose_places(book)
write_book(book)
return {'ok'}
