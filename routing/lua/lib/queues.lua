-- The queues of waiting shapes.

-- The index of waiting shapes in which a shape stands beside the whole index. For a queue it is the index of that
-- queue. In the default queue it is the index of the shape's first resource that not every worker has.
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

-- File jobs under their shape. `jobs`: order, id, order, id, ...; `first`: the least of these orders. The caller writes
-- the hashes of the jobs.
local function file(shape, jobs, first)
  redis.call('ZADD', KEY.wait .. shape, unpack(jobs))
  local head = redis.call('ZSCORE', KEY.shapes, shape)
  if not head or tonumber(first) < tonumber(head) then
    redis.call('ZADD', KEY.shapes, first, shape)
    redis.call('ZADD', shapes_beside(shape), first, shape)
  end
end

-- Update the place of a shape among the shapes to that of its new first job, after a job left its queue. Returns that
-- job's order, or nil where no job of the shape waits any more.
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

-- The shape under which the next attempt of a job is filed. The job runs alone where one more loss ends it (`held_by`
-- of routing/policy/placement.py). Names stand in the order of their bytes.
local function shape_held(shape, losses, most_losses)
  local most = tonumber(most_losses)
  if most <= 1 or tonumber(losses) < most - 1 or amounts_of(shape).alone then
    return shape
  end
  local parts, unplaced = {}, 'alone'
  for name, amount in string.gmatch(shape, '([^=,]+)=(%d+)') do
    if unplaced then
      local at = 1
      while at <= #name and string.byte(name, at) == string.byte(unplaced, at) do
        at = at + 1
      end
      if (string.byte(name, at) or 0) > (string.byte(unplaced, at) or 0) then
        parts[#parts + 1], unplaced = 'alone=1', nil
      end
    end
    parts[#parts + 1] = name .. '=' .. amount
  end
  if unplaced then
    parts[#parts + 1] = 'alone=1'
  end
  parts[#parts + 1] = task_of(shape)
  return table.concat(parts, ',')
end
