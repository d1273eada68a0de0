-- The search for a worker.

-- The index of the workers that may have room for these amounts: that of their queue; in the default queue that of the
-- resource which the fewest have, of equal ones the first by name; else the whole one.
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

-- What admission asks of a book: the fields for these amounts, always in the same order. (Not `places`, which may be as
-- long as the names of a hundred queues: it is read of the one that is chosen.)
local function asked_fields(amounts)
  local fields = {'epoch', 'lease', 'incarnation', 'queue', 'c.queue:', 'c.cpus', 'a.cpus', 'c.slots', 'a.slots'}
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

-- The part of a candidate's book that these amounts concern, if it has room for all of them and its lease lives.
local function with_room(worker, epoch, now, amounts, fields, names, labelled)
  local values = redis.call('HMGET', KEY.book .. worker, unpack(fields))
  if values[1] ~= epoch or not values[2] or tonumber(values[2]) <= now or (values[5] and not labelled) then
    return nil
  end
  local book = {worker = worker, incarnation = values[3], queue = values[4], only = values[5], capacity = {alone = 1},
    allocated = {}, unwritten = {}}
  for i, name in ipairs(names) do
    local capacity, allocated = tonumber(values[4 + 2 * i] or '0'), tonumber(values[5 + 2 * i] or '0')
    if amounts[name] and capacity - allocated < amounts[name] then
      return nil
    end
    book.capacity[name], book.allocated[name] = capacity, allocated
  end
  if amounts.alone and book.allocated.slots > 0 then
    return nil
  end
  return book
end

-- The first of some candidates from an index that has room: its book, or nil. A worker outside the whole index admits
-- nothing, though a damaged index of a resource may still list it.
local function first_with_room(index, candidates, epoch, now, amounts)
  local fields, names, labelled = asked_fields(amounts)
  for _, worker in ipairs(candidates) do
    if index == KEY.free or redis.call('ZSCORE', KEY.free, worker) then
      local book = with_room(worker, epoch, now, amounts, fields, names, labelled)
      if book then
        return book
      end
    end
  end
  return nil
end

-- Write what was allocated, these amounts among it, into the book that with_room gave.
local function enter(book, amounts)
  write_amounts(book, amounts)
  local open = room(book, 'slots') >= 1 and (book.allocated.alone or 0) == 0
  stand(book.worker, open and int(room(book, 'cpus')), book.only,
    redis.call('HGET', KEY.book .. book.worker, 'places'))
end
