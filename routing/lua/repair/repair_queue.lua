#!lua flags=allow-oom
-- Does: repairs the queue of a shape for one job, and the indexes of shapes for the first job of the shape.
-- KEYS: none; by name: epoch, job, wait, shapes, shapes_of, asks, border, low, paused, withheld, tenant_heads
-- ARGV: epoch, run_id, shape, id (of a job; '' when only the shape is looked at), seen (the resource in whose index the
--   shape was seen; '': none)
-- Replies: {ok, differed (1, else 0)} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
local different = 0
if id ~= '' then
  local job = read_job(id)
  local belongs = job and job.state == 'waiting' and job.shape == shape
  local score = redis.call('ZSCORE', KEY.wait .. shape, id)
  if belongs and (not score or tonumber(score) ~= tonumber(job.order)) then
    count_waiting(redis.call('ZADD', KEY.wait .. shape, job.order, id))
    different = 1
  elseif score and not belongs then
    unqueue(shape, id)
    different = 1
  end
end
if is_paused(facts.paused, shape) then
  -- A pass takes a paused shape out of the indexes once it meets it, and either is right.
  if redis.call('EXISTS', KEY.wait .. shape) == 1 then
    redis.call('SADD', KEY.withheld, shape)
  end
  return {'ok', int(different)}
end
local beside, asked = shapes_beside(shape), {}
for _, name in ipairs({'cpus', 'memory'}) do
  asked[name] = redis.call('ZSCORE', KEY.asks .. name, shape)
end
local before, before_beside = redis.call('ZSCORE', KEY.shapes, shape), redis.call('ZSCORE', beside, shape)
local after = refile(shape)
if after then
  note_asked(shape)
end
for _, name in ipairs({'cpus', 'memory'}) do
  if redis.call('ZSCORE', KEY.asks .. name, shape) ~= asked[name] then
    different = 1
  end
end
if (before and tonumber(before) or nil) ~= after or (before_beside and tonumber(before_beside) or nil) ~= after then
  different = 1
end
if seen ~= '' and KEY.shapes_of .. seen ~= beside and redis.call('ZREM', KEY.shapes_of .. seen, shape) == 1 then
  different = 1
end
return {'ok', int(different)}
