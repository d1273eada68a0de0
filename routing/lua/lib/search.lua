-- The search for a worker.

-- The index of the workers that may have room for these amounts. For a queue it is the index of that queue. In the
-- default queue it is the index of the resource which the fewest workers have, of equal ones the first by name. Without
-- such a resource it is the whole index.
local function index_for(amounts)
  local first, fewest = nil, nil
  for name in pairs(amounts) do
    if has_index(name) then
      if string.sub(name, 1, 6) == 'queue:' then
        return KEY.free_of .. name
      end
      local have = redis.call('ZCARD', KEY.free_of .. name)
      if not first or have < fewest or (have == fewest and name < first) then
        first, fewest = name, have
      end
    end
  end
  return first and KEY.free_of .. first or KEY.free
end

-- The fields of a book that admission reads for these amounts, always in the same order. `places` is not among them,
-- because it may be as long as the names of a hundred queues. It is read only from the book that is chosen.
local function asked_fields(amounts)
  local fields = {'epoch', 'lease', 'incarnation', 'queue', 'c.queue:', 'tasks', 'c.cpus', 'a.cpus', 'c.slots',
    'a.slots'}
  local names, labelled = {'cpus', 'slots'}, false
  for name in pairs(amounts) do
    if name ~= 'cpus' and name ~= 'slots' and name ~= 'alone' then
      labelled = labelled or string.sub(name, 1, 6) == 'queue:'
      names[#names + 1] = name
      fields[#fields + 1] = 'c.' .. name
      fields[#fields + 1] = 'a.' .. name
    end
  end
  return fields, names, labelled
end

-- The part of a candidate's book that these amounts concern, or nil where it lacks room for one of them, does not know
-- the task of the shape, or its lease ran out.
local function with_room(worker, epoch, now, shape, amounts, fields, names, labelled)
  local values = redis.call('HMGET', KEY.book .. worker, unpack(fields))
  if values[1] ~= epoch or not values[2] or tonumber(values[2]) <= now or (values[5] and not labelled) then
    return nil
  end
  local book = {worker = worker, incarnation = values[3], queue = values[4], only = values[5], capacity = {alone = 1},
    allocated = {}, unwritten = {}}
  for i, name in ipairs(names) do
    local capacity, allocated = tonumber(values[5 + 2 * i] or '0'), tonumber(values[6 + 2 * i] or '0')
    if amounts[name] and capacity - allocated < amounts[name] then
      return nil
    end
    book.capacity[name], book.allocated[name] = capacity, allocated
  end
  if (amounts.alone and book.allocated.slots > 0) or not knows(values[6], shape) then
    return nil
  end
  return book
end

-- The book of the first candidate with room, or nil. The candidates come from an index. A worker outside the whole
-- index admits nothing, though a damaged index of a resource may still list it.
local function first_with_room(index, candidates, epoch, now, shape, amounts)
  local fields, names, labelled = asked_fields(amounts)
  for _, worker in ipairs(candidates) do
    if index == KEY.free or redis.call('ZSCORE', KEY.free, worker) then
      local book = with_room(worker, epoch, now, shape, amounts, fields, names, labelled)
      if book then
        return book
      end
    end
  end
  return nil
end

-- Write the allocations, these amounts among them, into the book that with_room returned.
local function enter(book, amounts)
  write_amounts(book, amounts)
  local open = room(book, 'slots') >= 1 and (book.allocated.alone or 0) == 0
  stand(book.worker, open and int(room(book, 'cpus')), book.only,
    redis.call('HGET', KEY.book .. book.worker, 'places'))
end
