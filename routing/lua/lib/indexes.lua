-- The places of a worker in the indexes of free CPUs, and the writing of its book.

-- True if there is an index of the workers that have a resource, and one of the shapes that ask for it. A resource that
-- every worker has needs none.
local function has_index(name)
  return name ~= 'cpus' and name ~= 'slots' and name ~= 'memory' and name ~= 'alone' and name ~= 'queue:'
end

-- The resources in whose indexes of free CPUs a worker stands. A worker stands in those of all its resources but CPUs
-- and slots. A worker that takes only jobs with a label stands in those of its queues alone.
local function resources_of(book)
  local names, only = {}, book.capacity['queue:']
  for name, amount in pairs(book.capacity) do
    local indexed = string.sub(name, 1, 6) == 'queue:' or not only
    if (has_index(name) or name == 'memory') and amount > 0 and indexed then
      names[#names + 1] = name
    end
  end
  return names
end

-- Write into a book the indexes in which its worker stands, by its capacity. The worker leaves its old indexes here,
-- and enters the new ones when the book is written. Called only for a worker that has registered, and so keeps these
-- indexes itself. A reserved book has no places.
local function choose_places(book)
  local names = resources_of(book)
  table.sort(names)
  local places = #names > 0 and table.concat(names, ',') or nil
  if places == book.places then
    return
  end
  for name in string.gmatch(book.places or '', '[^,]+') do
    redis.call('ZREM', KEY.free_of .. name, book.worker)
  end
  book.places = places
  if places then
    redis.call('HSET', KEY.book .. book.worker, 'places', places)
  else
    redis.call('HDEL', KEY.book .. book.worker, 'places')
  end
end

-- Put a worker into the indexes of free CPUs in which it stands, or with free = nil take it out of them. `book` has its
-- amounts of the resources in `places`. A worker that takes only jobs with a label (`only`) stands in the whole index
-- before all others, where no search looks. Searches find it in the indexes of its queues.
local function stand(worker, free, only, places, book)
  if free then
    redis.call('ZADD', KEY.free, only and places and '-1' or int(free), worker)
  else
    redis.call('ZREM', KEY.free, worker)
  end
  if not places then
    return
  end
  for name in string.gmatch(places, '[^,]+') do
    if free then
      redis.call('ZADD', KEY.free_of .. name, place_score(book, name, free), worker)
    else
      redis.call('ZREM', KEY.free_of .. name, worker)
    end
  end
end

-- Take a worker out of the indexes of free CPUs before its book goes, or closes. Where the book is gone already, that
-- is the index in which nearly every worker stands.
local function withdraw(worker)
  stand(worker, nil, nil, redis.call('HGET', KEY.book .. worker, 'places') or 'memory')
end

-- Write the changes of allocations on a book to the book itself, the sums and the view for people. An amount that was
-- given back and taken again is no change.
local function write_amounts(book)
  local fields, shown, n, m = {}, {}, 0, 0
  for name, difference in pairs(book.unwritten) do
    if difference ~= 0 then
      local allocated = book.allocated[name]
      fields[n + 1], fields[n + 2], n = 'a.' .. name, int(allocated), n + 2
      if name == 'cpus' then
        shown[m + 1], shown[m + 2], m = 'allocated_cpus', cpus_text(allocated), m + 2
      elseif name == 'memory' or name == 'slots' then
        shown[m + 1], shown[m + 2], m = 'allocated_' .. name, int(allocated), m + 2
      end
    end
  end
  local cpus = book.unwritten.cpus or 0
  book.unwritten = {}
  if n > 0 then
    redis.call('HSET', KEY.book .. book.worker, unpack(fields))
  end
  if cpus ~= 0 then
    redis.call('SET', KEY.allocated_cpus, cpus_text(redis.call('INCRBY', KEY.allocated, int(cpus))))
  end
  if m > 0 and redis.call('EXISTS', KEY.view .. book.worker) == 1 then
    redis.call('HSET', KEY.view .. book.worker, unpack(shown))
  end
end

-- Write the changes of allocations on a whole book, as write_amounts does, and its places in the indexes of free CPUs.
local function write_book(book)
  write_amounts(book)
  if book.shrunk and not over(book) then
    redis.call('HDEL', KEY.book .. book.worker, 'shrunk')
  end
  stand(book.worker, is_open(book) and room(book, 'cpus'), book.capacity['queue:'], book.places, book)
end

-- Write all allocated amounts of a book into a view that was made just now, behind these fields and values.
local function show(book, fields)
  for _, name in ipairs({'cpus', 'memory', 'slots'}) do
    local amount = book.allocated[name] or 0
    fields[#fields + 1] = 'allocated_' .. name
    fields[#fields + 1] = name == 'cpus' and cpus_text(amount) or int(amount)
  end
  redis.call('HSET', KEY.view .. book.worker, unpack(fields))
end
