-- The queues of waiting shapes.

-- The index of waiting shapes in which one stands beside the whole one: that of its queue; in the default queue that of
-- the first resource it asks for which not every worker has.
local function shapes_beside(shape)
  local label = label_of(shape)
  if label then
    return KEY.shapes_of .. label
  end
  for name in string.gmatch(shape, '([^=,]+)=') do
    if has_index(name) then
      return KEY.shapes_of .. name
    end
  end
  return KEY.shapes_of .. LIMIT.unlabelled
end

-- File jobs under their shape: order, id, order, id, ... of which `first` is the least. Their own hashes are the caller's.
local function file(shape, jobs, first)
  redis.call('ZADD', KEY.wait .. shape, unpack(jobs))
  local head = redis.call('ZSCORE', KEY.shapes, shape)
  if not head or tonumber(first) < tonumber(head) then
    redis.call('ZADD', KEY.shapes, first, shape)
    redis.call('ZADD', shapes_beside(shape), first, shape)
  end
end

-- After something left the queue of a shape: its place among the shapes is that of its new first job.
-- Returns that job's order, or nil when nothing waits any more.
local function refile(shape)
  local head = redis.call('ZRANGE', KEY.wait .. shape, 0, 0, 'WITHSCORES')
  if not head[1] then
    redis.call('ZREM', KEY.shapes, shape)
    redis.call('ZREM', shapes_beside(shape), shape)
    return nil
  end
  redis.call('ZADD', KEY.shapes, head[2], shape)
  redis.call('ZADD', shapes_beside(shape), head[2], shape)
  return tonumber(head[2])
end

-- The shape under which the next attempt of a job is filed: alone, where one more loss ends it (`held_by` of
-- routing/policy/placement.py). Names stand in the order of their bytes.
local function shape_held(shape, losses, most_losses)
  local most = tonumber(most_losses)
  if most <= 1 or tonumber(losses) < most - 1 or amounts_of(shape).alone then
    return shape
  end
  local parts, own = {}, 'alone'
  for name, amount in string.gmatch(shape, '([^=,]+)=(%d+)') do
    if own then
      local at = 1
      while at <= #name and string.byte(name, at) == string.byte(own, at) do
        at = at + 1
      end
      if (string.byte(name, at) or 0) > (string.byte(own, at) or 0) then
        parts[#parts + 1], own = 'alone=1', nil
      end
    end
    parts[#parts + 1] = name .. '=' .. amount
  end
  if own then
    parts[#parts + 1] = 'alone=1'
  end
  return table.concat(parts, ',')
end
