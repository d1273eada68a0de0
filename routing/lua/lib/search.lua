-- The search for a worker.

-- The fields of a book that admission reads for these amounts, always in the same order. `places` is the last one, and
-- read only from the first candidate, because it may be as long as the names of a hundred queues. From another one that
-- is chosen it is read later. The end of the worker's life is read for a job with a bound alone, and the labels for one
-- with conditions.
local function asked_fields(amounts, bound, conditions)
  local fields = {'epoch', 'lease', 'incarnation', 'queue', 'c.queue:', 'tasks', 'c.cpus', 'a.cpus', 'c.slots',
    'a.slots', 'c.memory', 'a.memory'}
  local names, labelled = {'cpus', 'slots', 'memory'}, false
  for name in pairs(amounts) do
    if name ~= 'cpus' and name ~= 'slots' and name ~= 'memory' and name ~= 'alone' then
      labelled = labelled or string.sub(name, 1, 6) == 'queue:'
      names[#names + 1] = name
      fields[#fields + 1] = 'c.' .. name
      fields[#fields + 1] = 'a.' .. name
    end
  end
  if bound then
    fields[#fields + 1], fields.ends = 'ends', #fields + 1
  end
  if conditions then
    fields[#fields + 1], fields.labels = 'labels', #fields + 1
  end
  fields[#fields + 1], fields.places = 'places', #fields + 1
  return fields, names, labelled
end

-- The part of a candidate's book that these amounts concern, or nil where it lacks room for one of them, does not know
-- the task of the shape, does not meet its conditions, ends before a job of the shape does, or its lease ran out.
local function with_room(worker, epoch, now, shape, amounts, fields, names, labelled, bound)
  local values = redis.call('HMGET', KEY.book .. worker, unpack(fields))
  if values[1] ~= epoch or not values[2] or tonumber(values[2]) <= now or (values[5] and not labelled) then
    return nil
  end
  local ends = fields.ends and values[fields.ends]
  if ends and now + bound > tonumber(ends) then
    return nil
  end
  if fields.labels and not allows(conditions_of(shape), worker, values[fields.labels]) then
    return nil
  end
  local book = {worker = worker, incarnation = values[3], queue = values[4], only = values[5], capacity = {alone = 1},
    allocated = {}, unwritten = {}, places = fields.places and values[fields.places]}
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

-- Search for the best worker for a shape, behind a cursor of free CPUs and worker where there is one. It looks at no
-- more than `most` workers. Returns its book, or nil, and the number of workers looked at. Where there may be others,
-- it also returns the cursor behind which they stand. A worker outside the whole index admits nothing, though a damaged
-- index of a resource may still list it. Where the shape names a worker, that one alone is looked at.
local function search(shape, amounts, epoch, now, most, cursor_cpus, cursor_worker)
  local bound, conditions, spread = bound_of(shape), conditions_of(shape), is_spread(shape)
  local fields, names, labelled = asked_fields(amounts, bound, conditions)
  local named = named_worker(conditions)
  if named then
    local open = redis.call('ZSCORE', KEY.free, named)
    return open and with_room(named, epoch, now, shape, amounts, fields, names, labelled, bound) or nil, 1
  end
  local cpus, worker = amounts.cpus or 0, nil
  if cursor_worker ~= '' then
    cpus, worker = tonumber(cursor_cpus), cursor_worker
  end
  local looked, likely = 0, not worker
  local walk = spread and open_spread(amounts, cpus, worker, likely) or open_walk(amounts, cpus, worker, likely)
  while looked < most do
    worker, cpus = next_candidate(walk)
    if not worker then
      return nil, looked
    end
    looked = looked + 1
    if walk.whole or redis.call('ZSCORE', KEY.free, worker) then
      local book = with_room(worker, epoch, now, shape, amounts, fields, names, labelled, bound)
      if book then
        return book, looked
      elseif fields.places then
        fields[fields.places], fields.places = nil, nil
      end
    end
    -- The first few are nearly always enough. Where they are not, workers with too little memory may be many.
    if looked == LIMIT.few and amounts.memory and not labelled then
      walk = spread and open_spread(amounts, cpus, worker) or open_walk(amounts, cpus, worker)
    end
  end
  return nil, looked, int(cpus), worker
end

-- Write the allocations into the book that a search returned.
local function enter(book)
  write_amounts(book)
  local open = room(book, 'slots') >= 1 and (book.allocated.alone or 0) == 0
  local places = book.places
  if places == nil then
    places = redis.call('HGET', KEY.book .. book.worker, 'places')
  end
  -- The search read the amounts of its own request only.
  for name in string.gmatch(open and places or '', '[^,]+') do
    if not book.capacity[name] and string.sub(name, 1, 6) ~= 'queue:' then
      local amounts = redis.call('HMGET', KEY.book .. book.worker, 'c.' .. name, 'a.' .. name)
      book.capacity[name], book.allocated[name] = tonumber(amounts[1] or '0'), tonumber(amounts[2] or '0')
    end
  end
  stand(book.worker, open and room(book, 'cpus'), book.only, places, book)
end
