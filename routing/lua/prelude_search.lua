-- Shared by the scripts of the ledger, as prelude.lua is. Here: the search for a worker.

-- What admission asks of a book: the fields for these amounts, always in the same order.
local function asked_fields(amounts)
  local fields, names = {'epoch', 'lease', 'incarnation', 'queue', 'c.cpus', 'a.cpus', 'c.slots', 'a.slots'}, {'cpus', 'slots'}
  local labelled = false
  for name in pairs(amounts) do
    labelled = labelled or string.sub(name, 1, 6) == 'queue:'
    if name ~= 'cpus' and name ~= 'slots' and name ~= 'alone' then
      names[#names + 1] = name
      fields[#fields + 1] = 'c.' .. name
      fields[#fields + 1] = 'a.' .. name
    end
  end
  if not labelled then
    -- Last: that the worker takes only what has a label.
    fields[#fields + 1] = 'c.queue:'
  end
  return fields, names
end

-- The part of a candidate's book that these amounts concern, if it has room for all of them and its lease lives.
local function with_room(worker, epoch, now, amounts, fields, names)
  local values = redis.call('HMGET', KEY.book .. worker, unpack(fields))
  if values[1] ~= epoch or not values[2] or tonumber(values[2]) <= now then
    return nil
  end
  if #fields > 4 + 2 * #names and values[#fields] then
    return nil
  end
  local book = {worker = worker, incarnation = values[3], queue = values[4], capacity = {}, allocated = {}}
  for i, name in ipairs(names) do
    local capacity, allocated = tonumber(values[3 + 2 * i] or '0'), tonumber(values[4 + 2 * i] or '0')
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

-- The first of some candidates that has room: its book, or nil.
local function first_with_room(candidates, epoch, now, amounts)
  local fields, names = asked_fields(amounts)
  for _, worker in ipairs(candidates) do
    local book = with_room(worker, epoch, now, amounts, fields, names)
    if book then
      return book
    end
  end
  return nil
end

-- Enter an admission into the book that with_room gave.
local function enter(book, amounts)
  write_amounts(book, amounts)
  if book.capacity.slots > book.allocated.slots and not amounts.alone then
    redis.call('ZADD', KEY.free, int(book.capacity.cpus - book.allocated.cpus), book.worker)
  else
    redis.call('ZREM', KEY.free, book.worker)
  end
end
