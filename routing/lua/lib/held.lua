-- The jobs that a worker holds.

-- The shape of an entry of a worker's list, nil for a stray entry, which matches no job's own key.
local function shape_of_held(worker, id, token)
  local job = redis.call('HMGET', KEY.job .. id, 'state', 'epoch', 'attempt', 'worker', 'shape')
  local held = (job[1] == 'admitted' or job[1] == 'running') and job[4] == worker and job[2] .. '.' .. job[3] == token
  return held and job[5] or nil
end

-- The sum of the amounts of the jobs that a worker holds, and the stray entries of its list. nil where the list has
-- more than LIMIT.held entries: the caller then counts them in pages, and passes the sum (`counted`, as a shape).
local function sum_held(worker, counted)
  if counted ~= '' then
    return amounts_of(counted), {}
  end
  if redis.call('HLEN', KEY.held .. worker) > LIMIT.held then
    return nil
  end
  local sums, strays = {}, {}
  local held = redis.call('HGETALL', KEY.held .. worker)
  for i = 1, #held, 2 do
    local shape = shape_of_held(worker, held[i], held[i + 1])
    for name, amount in pairs(shape and amounts_of(shape) or {}) do
      sums[name] = (sums[name] or 0) + amount
    end
    if not shape then
      strays[#strays + 1] = held[i]
    end
  end
  return sums, strays
end
