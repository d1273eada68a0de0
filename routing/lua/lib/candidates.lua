-- The candidates for a job: the workers that may have room for it, in order of free CPUs, then of names.
--
-- A walk goes through one list, or merges several. A list is a range of an index, whose scores less `base` are free
-- CPUs: the whole index, the index of a queue, or one class in the index of a resource.

-- The number of members of an index up to (score, worker). The worker may have left its place.
local function rank_behind(key, score, worker)
  if redis.call('ZSCORE', key, worker) == score then
    return redis.call('ZRANK', key, worker) + 1
  end
  local low, high = redis.call('ZCOUNT', key, '-inf', '(' .. score), redis.call('ZCOUNT', key, '-inf', score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if is_before(worker, redis.call('ZRANGE', key, int(middle), int(middle))[1]) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

-- Read the next few members of a list.
local function turn_page(list)
  if list.rank then
    list.rows = redis.call('ZRANGE', list.key, int(list.rank), int(list.rank + LIMIT.few - 1), 'WITHSCORES')
    list.rank = list.rank + LIMIT.few
  else
    list.rows = redis.call('ZRANGEBYSCORE', list.key, list.score, '+inf', 'WITHSCORES', 'LIMIT', list.seen, LIMIT.few)
    list.seen = list.seen + LIMIT.few
  end
  list.at = 1
end

-- A list of the workers with at least so many free CPUs, or of those behind `worker` with as many.
local function list_from(key, base, top, cpus, worker)
  local list = {key = key, base = base, low = -math.huge, top = top, score = int(base + cpus), seen = 0}
  list.rank = worker and rank_behind(key, list.score, worker)
  turn_page(list)
  return list
end

-- The lists of all classes of a resource in which there are such workers with enough of it. In the lowest class some
-- workers may have too little.
local function lists_of_classes(key, amount, cpus, worker)
  local lists, class = {}, class_of(amount)
  while true do
    local list = list_from(key, class * LIMIT.span, (class + 1) * LIMIT.span, cpus, worker)
    local score = tonumber(list.rows[2])
    if not score then
      return lists
    end
    if score < list.top then
      lists[#lists + 1], class = list, class + 1
    else
      class = math.floor(score / LIMIT.span)
    end
  end
end

-- The index in which all candidates for these amounts stand. For a queue it is the index of that queue. In the default
-- queue it is the index of the resource of which the fewest workers may have enough, of equal ones the first by name.
-- Without such a resource it is the whole index. With `most_likely` no memory is looked up: nearly always one of the
-- first candidates has enough. Returns its key, the amount by whose classes it is ordered, or nil, and if it is the
-- whole index.
local function index_for(amounts, most_likely)
  local names, label = {}, nil
  for name in pairs(amounts) do
    if string.sub(name, 1, 6) == 'queue:' then
      label = name
    elseif has_index(name) or (name == 'memory' and not most_likely) then
      names[#names + 1] = name
    end
  end
  if label or #names == 0 then
    return label and KEY.free_of .. label or KEY.free, nil, not label
  end
  local first, fewest = names[1], nil
  for _, name in ipairs(#names > 1 and names or {}) do
    local have = redis.call('ZCOUNT', KEY.free_of .. name, int(class_of(amounts[name]) * LIMIT.span), '+inf')
    if not fewest or have < fewest or (have == fewest and is_before(name, first)) then
      first, fewest = name, have
    end
  end
  return KEY.free_of .. first, amounts[first]
end

-- Open a walk over the candidates for these amounts that have at least so many free CPUs, or behind `worker` with as
-- many.
local function open_walk(amounts, cpus, worker, most_likely)
  local key, amount, whole = index_for(amounts, most_likely)
  local lists = amount and lists_of_classes(key, amount, cpus, worker) or {list_from(key, 0, math.huge, cpus, worker)}
  return {whole = whole, lists = lists, turn = turn_page}
end

-- Take the next candidate of a walk. Returns its name and its free CPUs, or nil. A walk that goes `down` comes from the
-- other end (lib/spread.lua).
local function next_candidate(walk)
  local first, name, cpus
  for _, list in ipairs(walk.lists) do
    if list.at > #list.rows and #list.rows > 0 then
      walk.turn(list)
    end
    local worker, score = list.rows[list.at], tonumber(list.rows[list.at + 1])
    if score and score < list.top and score >= list.low then
      local free, down = score - list.base, walk.down or false
      local comes_first = not first or (free == cpus and is_before(worker, name) ~= down)
        or (free ~= cpus and (free < cpus) ~= down)
      if comes_first then
        first, name, cpus = list, worker, free
      end
    end
  end
  if first then
    first.at = first.at + 2
  end
  return name, cpus
end
