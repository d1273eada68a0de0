-- The queues of waiting shapes.

-- Enter a shape into the indexes of asked amounts, by which a pass passes over shapes that ask for too much. Of
-- alternatives the least amount counts. A shape that must run alone stands before all others there: a worker on which
-- it does not fit now may be kept for it.
local function note_asked(shape)
  local options = options_of(shape)
  for _, name in ipairs({'cpus', 'memory'}) do
    local least = options[1][name] or 0
    for i = 2, #options do
      least = math.min(least, options[i][name] or 0)
    end
    redis.call('ZADD', KEY.asks .. name, options[1].alone and '-1' or int(least), shape)
  end
end

-- True if a shape waits here.
local function is_waiting(facts)
  return facts.waiting > 0 or redis.call('EXISTS', KEY.shapes) == 1
end

-- True if a waiting shape may fit on a worker by its free CPUs. A shape that must run alone stands before all others.
local function may_fit(book)
  return redis.call('ZCOUNT', KEY.asks .. 'cpus', '-inf', int(room(book, 'cpus'))) > 0
end

-- Count jobs that came into the backlog here, or left it (negative).
local function count_waiting(number)
  redis.call('HINCRBY', KEY.epoch, 'waiting', number)
end

-- File jobs under their shape. `jobs`: order, id, order, id, ...; `first`: the least of these orders. The caller writes
-- the hashes of the jobs. A job behind one that stays in Postgres does not make its shape wait, nor does a paused one
-- (lib/controls.lua).
local function file(shape, jobs, first, paused)
  count_waiting(redis.call('ZADD', KEY.wait .. shape, unpack(jobs)))
  if paused then
    redis.call('SADD', KEY.withheld, shape)
    return
  end
  local head = redis.call('ZSCORE', KEY.shapes, shape)
  if not head or tonumber(first) < tonumber(head) then
    local border = redis.call('ZSCORE', KEY.border, shape)
    if border and tonumber(first) >= tonumber(border) then
      return
    end
    redis.call('ZADD', KEY.shapes, first, shape)
    redis.call('ZADD', shapes_beside(shape), first, shape)
    note_head(shape)
  end
  if not head then
    note_asked(shape)
  end
end

-- Take a shape out of the indexes of waiting shapes.
local function leave_indexes(shape)
  redis.call('ZREM', KEY.shapes, shape)
  redis.call('ZREM', shapes_beside(shape), shape)
  redis.call('ZREM', KEY.asks .. 'cpus', shape)
  redis.call('ZREM', KEY.asks .. 'memory', shape)
  note_head(shape)
end

-- Take a job out of the queue of its shape. The caller updates the place of the shape.
local function unqueue(shape, id)
  if redis.call('ZREM', KEY.wait .. shape, id) == 1 then
    count_waiting(-1)
  end
end

-- Update the place of a shape among the shapes to that of its new first job, after a job left its queue. Returns that
-- job's order, or nil where no job of the shape may start any more. Where the head of the shape runs low, others that
-- stay in Postgres are asked for.
local function refile(shape)
  local id, order, border = first_of(shape)
  if border then
    ask_for_more(shape, border)
  end
  if not id then
    leave_indexes(shape)
    return nil
  end
  redis.call('ZADD', KEY.shapes, order, shape)
  redis.call('ZADD', shapes_beside(shape), order, shape)
  note_head(shape)
  return tonumber(order)
end

-- The shape under which the next attempt of a job is filed. The job runs alone where one more loss ends it (`held_by`
-- of routing/policy/placement.py).
local function shape_held(shape, losses, most_losses)
  local most = tonumber(most_losses)
  if most <= 1 or tonumber(losses) < most - 1 or amounts_of(shape).alone then
    return shape
  end
  local parts = {with_alone(shape)}
  parts[#parts + 1] = task_of(shape)
  parts[#parts + 1] = suffix_of(shape)
  return table.concat(parts, ',')
end
