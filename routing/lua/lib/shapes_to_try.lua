-- The shapes that a pass over a worker tries, by their first jobs. They are read a few at a time: it is soon full.

-- The lists in which the waiting shapes stand that a worker may take: those of its resources, and of the default queue.
-- Where few shapes wait, the whole index is one command instead of a hundred. `all`: true for the whole index, false
-- for the lists without the shapes of tenants, nil where no tenants are in use.
local function lists_of(book, all)
  if all then
    return {{key = KEY.shapes}}
  end
  local lists = {}
  for _, name in ipairs(resources_of(book)) do
    if has_index(name) then
      lists[#lists + 1] = {key = KEY.shapes_of .. name}
    end
  end
  if not book.capacity['queue:'] then
    lists[#lists + 1] = {key = KEY.shapes_of .. LIMIT.unlabelled}
  end
  if all == nil and #lists > 1 and redis.call('ZCARD', KEY.shapes) <= LIMIT.shapes then
    return {{key = KEY.shapes}}
  end
  return lists
end

-- Keep a shape among those to try, in the order of their first jobs.
local function keep_shape(tries, row)
  local shapes = tries.by_turns and turn_of(tries.sharing, tenant_of(row.shape)).shapes or tries.shapes
  local place = #shapes + 1
  while place > 1 and row.order < shapes[place - 1].order do
    place = place - 1
  end
  table.insert(shapes, place, row)
end

-- Look at a shape, and keep it if a job may start here now, or may have the worker kept for it. A shape whose first job
-- is admitted moves behind the cursor, and is met there again. Kept twice, its later jobs would come too early.
local function look_at(tries, book, shape, order)
  tries.looked = tries.looked + 1
  local options = not tries.seen[shape] and serves(book, shape) and options_of(shape)
  tries.seen[shape] = true
  if options and (fits_any(book, options) or options[1].alone and fits_any_empty(book, options)) and takes(book, shape)
    and not holds_back(book.pauses, shape) then
    keep_shape(tries, {shape = shape, order = order, options = options})
  end
end

-- Look at the next shapes of the lists, merged by their orders.
local function look_at_page(tries, book, size)
  for _ = 1, size do
    local first
    for _, list in ipairs(tries.lists) do
      if not list.rows or (list.at > #list.rows and #list.rows == 2 * list.size) then
        list.size = math.max(LIMIT.few, math.ceil(size / #tries.lists))
        local from = '(' .. (list.rows and list.rows[#list.rows] or tries.after)
        list.rows = redis.call('ZRANGEBYSCORE', list.key, from, '+inf', 'WITHSCORES', 'LIMIT', 0, list.size)
        list.at = 1
      end
      local order = tonumber(list.rows[list.at + 1])
      if order and (not first or order < first.order) then
        list.order, first = order, list
      end
    end
    if not first then
      tries.more = false
      return
    end
    tries.cursor = first.rows[first.at + 1]
    look_at(tries, book, first.rows[first.at], first.order)
    first.at = first.at + 2
  end
end

-- Look at these shapes, as far as they stand behind the cursor. No others are left for this worker.
local function look_at_last(tries, book, shapes)
  tries.more = false
  local orders = #shapes > 0 and redis.call('ZMSCORE', KEY.shapes, unpack(shapes)) or {}
  local behind = tonumber(tries.cursor)
  for i, shape in ipairs(shapes) do
    local order = tonumber(orders[i] or nil)
    if order and order > behind then
      look_at(tries, book, shape, order)
    end
  end
end

-- Look at all shapes that ask for little enough of one resource, where they are few. The worker can take no others.
local function look_at_small(tries, book)
  for _, name in ipairs({'cpus', 'memory'}) do
    local key, free = KEY.asks .. name, int(room(book, name))
    local small = redis.call('ZCOUNT', key, '-inf', free)
    if small <= LIMIT.shapes then
      local none = small == 0 and {}
      look_at_last(tries, book, none or redis.call('ZRANGEBYSCORE', key, '-inf', free, 'LIMIT', 0, LIMIT.shapes))
      return
    end
  end
end

-- Take the next shape to try, or nil. A pass looks at so many shapes, and the next pass goes on behind its cursor.
local function next_shape(tries, book)
  while tries.more and not (tries.shapes[1] and tries.shapes[1].order <= tonumber(tries.cursor)) do
    if room(book, 'slots') < 1 then
      -- A full worker may still be kept for a job that must be alone.
      look_at_last(tries, book, redis.call('ZRANGEBYSCORE', KEY.asks .. 'cpus', '-inf', '(0', 'LIMIT', 0, LIMIT.shapes))
    elseif tries.looked >= LIMIT.shapes then
      return nil
    elseif tries.looked == LIMIT.few then
      look_at_small(tries, book)
    end
    if tries.more then
      look_at_page(tries, book, tries.looked == 0 and LIMIT.few or LIMIT.shapes - LIMIT.few)
    end
  end
  return table.remove(tries.shapes, 1)
end
