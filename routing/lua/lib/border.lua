-- The border between the waiting jobs of a shape that are here, and those that stay in Postgres.
--
-- The ledger holds only the head of the backlog. The border of a shape is the least order of its jobs that stay in
-- Postgres, or less. A job with a lesser order may start, and any other waits until the jobs before it were fetched.

-- The number of jobs that one shape may have here, where others of it stay in Postgres.
local function share_of_head()
  if redis.call('HGET', KEY.epoch, 'tight') then
    return LIMIT.least
  end
  -- A shape of which no job may start before its border stands among the borders alone.
  local shapes = math.max(1, redis.call('ZCARD', KEY.shapes), redis.call('ZCARD', KEY.border))
  return math.max(LIMIT.least, math.floor(LIMIT.share / shapes))
end

-- The number of jobs of a shape to be fetched, 0 while more than half of its share may start before its border. Also
-- returns this share.
local function wanted(shape, border)
  local share, here = share_of_head(), redis.call('ZCOUNT', KEY.wait .. shape, '-inf', '(' .. border)
  return 2 * here <= share and share - here or 0, share
end

-- Ask the runner of the duties to fetch jobs of a shape, once its head runs low.
local function ask_for_more(shape, border)
  if wanted(shape, border) > 0 and redis.call('SADD', KEY.low, shape) == 1 then
    redis.call('PUBLISH', KEY.low, shape)
  end
end

-- The first job of a shape that may start, and its order; nil where none waits here, or an earlier one stays in
-- Postgres. Also returns the border of the shape, false where it has none.
local function first_of(shape)
  local head = redis.call('ZRANGE', KEY.wait .. shape, 0, 0, 'WITHSCORES')
  local border = redis.call('ZSCORE', KEY.border, shape)
  if head[1] and border and tonumber(head[2]) >= tonumber(border) then
    return nil, nil, border
  end
  return head[1], head[2], border
end
