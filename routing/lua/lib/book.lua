-- The book of a worker: read, and what it has room for.

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

-- May a worker be admitted to, and does it stand in the indexes of free CPUs? It is ready, not over its capacity, with a
-- slot free, which every job needs, and no job alone there, or waiting to be.
local function is_open(book)
  return book.status == 'ready' and not over(book) and room(book, 'slots') >= 1 and (book.allocated.alone or 0) == 0
    and not book.kept
end
