-- The candidates for a job that is spread: those of a walk, from the other end. The most free CPUs come first.

-- The number of members of an index before (score, worker). The worker may have left its place.
local function count_before(key, score, worker)
  local rank = rank_behind(key, score, worker)
  return redis.call('ZSCORE', key, worker) == score and rank - 1 or rank
end

-- Read the next few members of a list, the last ones first.
local function turn_back(list)
  local rows, from = {}, math.max(0, list.left - LIMIT.few)
  if list.left > 0 then
    local read = redis.call('ZRANGE', list.key, int(from), int(list.left - 1), 'WITHSCORES')
    for i = #read - 1, 1, -2 do
      rows[#rows + 1], rows[#rows + 2] = read[i], read[i + 1]
    end
  end
  list.rows, list.left, list.at = rows, from, 1
end

-- A list of the workers with scores from `base + cpus` to below `top`, or of those behind (score of free CPUs, worker).
local function list_down(key, base, top, cpus, most, worker)
  local list = {key = key, base = base, low = base + cpus, top = math.huge}
  if worker then
    list.left = count_before(key, int(base + most), worker)
  else
    list.left = redis.call('ZCOUNT', key, '-inf', top == math.huge and '+inf' or '(' .. int(top))
  end
  turn_back(list)
  return list
end

-- Open a walk as `open_walk` does, from the other end. `most`, `worker`: the cursor; without a worker there is none.
local function open_spread(amounts, most, worker, most_likely)
  local key, amount, whole = index_for(amounts, most_likely)
  local cpus = amounts.cpus or 0
  if not amount then
    local list = list_down(key, 0, math.huge, cpus, most, worker)
    return {whole = whole, lists = {list}, turn = turn_back, down = true}
  end
  local lists, below, lowest = {}, '+inf', class_of(amount)
  while true do
    local row = redis.call('ZREVRANGEBYSCORE', key, below, int(lowest * LIMIT.span), 'WITHSCORES', 'LIMIT', 0, 1)
    if not row[1] then
      return {lists = lists, turn = turn_back, down = true}
    end
    local base = math.floor(tonumber(row[2]) / LIMIT.span) * LIMIT.span
    lists[#lists + 1] = list_down(key, base, base + LIMIT.span, cpus, most, worker)
    below = '(' .. int(base)
  end
end
