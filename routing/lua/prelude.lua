-- Shared by the scripts of the ledger: the loader puts in front of each the functions that it uses, and writes the values
-- of KEY, STEP and LIMIT (routing/ledger/keys.py, routing/model/states.py, routing/policy/placement.py) where their names stand. Server time is
-- spent at every call on each function that is there, so there are no others. Here: values, and the books with their
-- places in the indexes.

-- A whole number as text: tostring() would write 1e+15.
local function int(number)
  return string.format('%.0f', number)
end

-- The server's clock in milliseconds: clients' clocks are not trusted.
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- What a caller names as run_id is the server's, and behind a slash the id of the caller's database in Postgres.
local function parted(run_id)
  return string.match(run_id, '^([^/]*)/?(.*)$')
end

-- nil when this caller may act on these books, else the reply that refuses it.
local function refused(epoch, run_id)
  local current = redis.call('HMGET', KEY.epoch, 'epoch', 'run_id', 'format', 'database')
  local life, database = parted(run_id)
  -- (Books of a newer format are closed to a process of before: what it accepted waits in Postgres for one that knows.)
  if not current[1] or current[2] ~= life or tonumber(current[3] or 1) > LIMIT.format then
    return {'cold'}
  end
  if current[4] and database ~= '' and current[4] ~= database then
    return {'cold'}
  end
  if current[1] ~= epoch then
    return {'epoch', current[1]}
  end
  return nil
end

local function count(what, by)
  redis.call('HINCRBY', KEY.counters, what, by)
end

-- "cpus=4000,slots=1" as {cpus = 4000, slots = 1}.
local function amounts_of(shape)
  local amounts = {}
  for name, amount in string.gmatch(shape, '([^=,]+)=(%d+)') do
    amounts[name] = tonumber(amount)
  end
  return amounts
end

-- Millicores as people read them: 72000 -> 72, 500 -> 0.5.
local function cpus_text(millicores)
  if millicores % 1000 == 0 then
    return int(millicores / 1000)
  end
  local text = string.format('%.3f', millicores / 1000)
  text = string.gsub(text, '0+$', '')
  return (string.gsub(text, '%.$', ''))
end

-- A worker's whole book, or nil where it is missing or of another epoch (COLD for that worker, never 0).
local function read_book(worker, epoch)
  local flat = redis.call('HGETALL', KEY.book .. worker)
  local book = {worker = worker, capacity = {alone = 1}, allocated = {}, unwritten = {}}
  for i = 1, #flat, 2 do
    local field, value = flat[i], flat[i + 1]
    local kind = string.sub(field, 1, 2)
    if kind == 'c.' then
      book.capacity[string.sub(field, 3)] = tonumber(value)
    elseif kind == 'a.' then
      book.allocated[string.sub(field, 3)] = tonumber(value)
    else
      book[field] = value
    end
  end
  if book.epoch ~= epoch or not book.lease then
    return nil
  end
  book.lease = tonumber(book.lease)
  return book
end

local function room(book, name)
  return (book.capacity[name] or 0) - (book.allocated[name] or 0)
end

-- The queue of a shape as it asks for it, nil for the default one.
local function label_of(shape)
  return string.find(shape, 'queue:', 1, true) and string.match(shape, '(queue:[^=,]+)=')
end

-- Does a worker take jobs of this queue at all? One that does not serve the default queue takes only what has a label.
local function serves(book, shape)
  local label = label_of(shape)
  if label then
    return (book.capacity[label] or 0) > 0
  end
  return not book.capacity['queue:']
end

-- Are there indexes of the workers that have a resource, and of the shapes that ask for it? (Not where all have it.)
local function has_index(name)
  return name ~= 'cpus' and name ~= 'slots' and name ~= 'memory' and name ~= 'alone' and name ~= 'queue:'
end

-- The resources in whose indexes of free CPUs a worker stands: all that it has of them, but of one that takes only what
-- has a label the queues alone.
local function resources_of(book)
  local names, only = {}, book.capacity['queue:']
  for name, amount in pairs(book.capacity) do
    if has_index(name) and amount > 0 and (not only or string.sub(name, 1, 6) == 'queue:') then
      names[#names + 1] = name
    end
  end
  return names
end

-- Write into a book in which indexes its worker stands, as its capacity says. Where it stood it stands no more until the
-- book is written. Called for a worker that keeps these indexes itself, and by nobody for another: then it has none.
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

-- Put a worker into the indexes of free CPUs in which it stands, or with free = nil take it out of them. One that takes
-- only what has a label (`only`) stands in the whole index before all others, where no search looks: it is found by its
-- queues.
local function stand(worker, free, only, places)
  if free then
    redis.call('ZADD', KEY.free, only and places and '-1' or free, worker)
  else
    redis.call('ZREM', KEY.free, worker)
  end
  if not places then
    return
  end
  for name in string.gmatch(places, '[^,]+') do
    if free then
      redis.call('ZADD', KEY.free_of .. name, free, worker)
    else
      redis.call('ZREM', KEY.free_of .. name, worker)
    end
  end
end

-- Take a worker out of the indexes of free CPUs before its book goes, or closes.
local function withdraw(worker)
  stand(worker, nil, nil, redis.call('HGET', KEY.book .. worker, 'places'))
end

-- Does the whole vector fit into what is free?
local function fits(book, amounts)
  for name, amount in pairs(amounts) do
    if room(book, name) < amount then
      return false
    end
  end
  return true
end

-- The same, were nothing allocated.
local function fits_empty(book, amounts)
  for name, amount in pairs(amounts) do
    if (book.capacity[name] or 0) < amount then
      return false
    end
  end
  return true
end

-- More allocated than there is, in any resource: nothing is admitted until it fits again. (Queues are none.)
local function over(book)
  for name, amount in pairs(book.allocated) do
    if amount > (book.capacity[name] or 0) and string.sub(name, 1, 6) ~= 'queue:' then
      return true
    end
  end
  return false
end

-- Allocate amounts on a book so many times (-1: give them back). To be written, once, when all that one script changes is.
local function allocate(book, amounts, times)
  for name, amount in pairs(amounts) do
    book.allocated[name] = (book.allocated[name] or 0) + times * amount
    book.unwritten[name] = (book.unwritten[name] or 0) + times * amount
  end
end

-- Write the difference that allocations made on a book, these (`changed`) among them: the book itself, the sums, the view
-- for people. What was given back and taken again leaves none.
local function write_amounts(book, changed)
  allocate(book, changed, 1)
  local fields, shown, n, m = {}, {}, 0, 0
  for name, difference in pairs(book.unwritten) do
    if difference ~= 0 or changed[name] then
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

-- May a worker be admitted to, and does it stand in the indexes of free CPUs? It is ready, not over its capacity, with a
-- slot free, which every job needs, and no job alone there, or waiting to be.
local function is_open(book)
  return book.status == 'ready' and not over(book) and room(book, 'slots') >= 1 and (book.allocated.alone or 0) == 0
    and not book.kept
end

-- The same for a whole book, whose places in the indexes of free CPUs are found anew.
local function write_book(book, changed)
  write_amounts(book, changed)
  if book.shrunk and not over(book) then
    redis.call('HDEL', KEY.book .. book.worker, 'shrunk')
  end
  stand(book.worker, is_open(book) and int(room(book, 'cpus')), book.capacity['queue:'], book.places)
end

-- All that a book has allocated, into a view that was made just now.
local function show(book)
  redis.call('HSET', KEY.view .. book.worker, 'allocated_cpus', cpus_text(book.allocated.cpus or 0),
    'allocated_memory', int(book.allocated.memory or 0), 'allocated_slots', int(book.allocated.slots or 0))
end
