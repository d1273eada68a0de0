-- The shapes that a pass over a worker tries.

-- The shapes behind an order that a worker may take, by the indexes of its resources: shape, order, shape, order, ...
-- There are no more than LIMIT.shapes of them. Each index is read a few shapes at a time, because there may be a
-- hundred indexes.
local function shapes_behind(book, order)
  local lists = {}
  for _, name in ipairs(resources_of(book)) do
    lists[#lists + 1] = {key = KEY.shapes_of .. name}
  end
  if not book.capacity['queue:'] then
    lists[#lists + 1] = {key = KEY.shapes_of .. LIMIT.unlabelled}
  end
  local size = math.max(LIMIT.few, math.ceil(LIMIT.shapes / #lists))
  local function step(list)
    list.at = (list.at or 2 * size - 1) + 2
    if list.at > 2 * size then
      list.rows = redis.call('ZRANGEBYSCORE', list.key, '(' .. order, '+inf', 'WITHSCORES', 'LIMIT', list.seen or 0,
        size)
      list.seen, list.at = (list.seen or 0) + size, 1
    end
    list.order = tonumber(list.rows[list.at + 1])
  end
  for _, list in ipairs(lists) do
    step(list)
  end
  local rows = {}
  while #rows < 2 * LIMIT.shapes do
    local first
    for _, list in ipairs(lists) do
      if list.order and (not first or list.order < first.order) then
        first = list
      end
    end
    if not first then
      break
    end
    rows[#rows + 1], rows[#rows + 2] = first.rows[first.at], first.rows[first.at + 1]
    step(first)
  end
  return rows
end

-- The shapes that a pass tries, in order of their first jobs, and the cursor behind them. `kept_row`: the only shape to
-- try, for which the worker was kept, and its order. A shape that does not fit now cannot fit later in this pass.
local function shapes_to_try(book, kept_row, after)
  local first_page, second_page, cursor = kept_row or {}, {}, ''
  if not kept_row and after == '' then
    first_page = redis.call('ZRANGE', KEY.shapes, 0, LIMIT.shapes - 1, 'WITHSCORES')
  end
  -- Behind the first page there may be a thousand shapes that ask for resources which this worker does not have.
  if not kept_row and (after ~= '' or #first_page == 2 * LIMIT.shapes) then
    second_page = shapes_behind(book, after == '' and first_page[#first_page] or after)
  end
  if #second_page == 2 * LIMIT.shapes then
    cursor = second_page[#second_page]
  end
  local shapes = {}
  for _, page in ipairs({first_page, second_page}) do
    for i = 1, #page, 2 do
      local amounts = serves(book, page[i]) and amounts_of(page[i])
      local possible = amounts and (fits(book, amounts) or (amounts.alone and fits_empty(book, amounts)))
      if possible and knows(book.tasks, page[i]) then
        shapes[#shapes + 1] = {shape = page[i], order = tonumber(page[i + 1]), amounts = amounts}
      end
    end
  end
  return shapes, cursor
end
