-- Does: brings in jobs of one shape that stayed in Postgres, in their order, and moves the border of the shape.
-- KEYS: none; by name: epoch, border, left, low, job, shapes, shapes_of, asks, free, free_of, book, wait, counters,
--   stream, held, unclaimed, view, allocated, allocated_cpus, carried, tasks, staying, paused, withheld, tenant_heads,
--   past, tenants, totals, used
-- ARGV: epoch, run_id, deadline (ms of the server), shape, next_order (that of the first job which still stays in
--   Postgres, '': none), then for each job: id, order, message, attempt (admissions so far), losses, submitted (ms),
--   rerun (0: its first lost attempt ends it), digest (of the message)
-- Replies: {ok, taken, wanted (jobs to be fetched after these)} | {late, now (ms)} | {cold} | {epoch, current}
-- Cost: at most six commands a job, and some forty for the batch; at the worst LIMIT.searched books are read
-- Repeat: harmless: a job that is known is left as it is
deadline = tonumber(deadline)
local now = clock()
if is_late(deadline, now, facts) then
  return {'late', int(now)}
end
-- A job that was left in Postgres after the caller began to read stays there too.
local left = redis.call('ZSCORE', KEY.left, shape)
if left and (next_order == '' or tonumber(left) < tonumber(next_order)) then
  next_order = left
end
if next_order ~= '' then
  redis.call('ZADD', KEY.border, next_order, shape)
  redis.call('HSET', KEY.epoch, 'stay', '1')
elseif redis.call('ZREM', KEY.border, shape) == 1 then
  redis.call('HDEL', KEY.staying, shape)
  if redis.call('EXISTS', KEY.border) == 0 then
    redis.call('HDEL', KEY.epoch, 'stay')
  end
end
facts.fetched = true
local taken, batch = 0, nil
for i = EACH.first, #ARGV, EACH.step do
  local id, order, message = ARGV[i + EACH.id], ARGV[i + EACH.order], ARGV[i + EACH.message]
  local attempt, losses, submitted = ARGV[i + EACH.attempt], ARGV[i + EACH.losses], ARGV[i + EACH.submitted]
  local rerun, digest = ARGV[i + EACH.rerun], ARGV[i + EACH.digest]
  local job = {state = 'waiting', epoch = epoch, attempt = attempt, shape = shape, order = order, losses = losses,
    submitted = submitted, message = message, digest = digest}
  local became
  became, batch = admit_or_file(id, job, rerun, facts, now, batch)
  if became[1] ~= 'exists' then
    taken = taken + 1
  end
end
if batch then
  write_batch(batch)
end
-- The caller goes on by itself, so the runner is not asked for more.
redis.call('SADD', KEY.low, shape)
if refile(shape) then
  note_asked(shape)
end
local number = next_order ~= '' and wanted(shape, next_order) or 0
if number == 0 then
  redis.call('SREM', KEY.low, shape)
end
return {'ok', int(taken), int(number)}
