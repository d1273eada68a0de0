-- The jobs that a worker holds.

-- The shape of an entry of a worker's list, nil for a stray entry, which matches no job's own key.
local function shape_of_held(worker, id, token)
  local job = read_job(id)
  local held = job and (job.state == 'admitted' or job.state == 'running') and job.worker == worker
    and token_of(job) == token
  return held and job.shape or nil
end

-- The sum of the amounts of the jobs that a worker holds, and the number of stray entries, which leave its list here: a
-- job whose own key was lost counts once it is adopted. nil where the list has more than LIMIT.held entries: the caller
-- then counts them in pages, and passes the sum (`counted`, as a shape).
local function sum_held(worker, counted)
  if counted ~= '' then
    return amounts_of(counted), 0
  end
  if redis.call('HLEN', KEY.held .. worker) > LIMIT.held then
    return nil
  end
  local sums, strays = {}, 0
  local held = redis.call('HGETALL', KEY.held .. worker)
  for i = 1, #held, 2 do
    local shape = shape_of_held(worker, held[i], held[i + 1])
    for name, amount in pairs(shape and amounts_of(shape) or {}) do
      sums[name] = (sums[name] or 0) + amount
    end
    if not shape then
      strays = strays + redis.call('HDEL', KEY.held .. worker, held[i])
    end
  end
  return sums, strays
end
