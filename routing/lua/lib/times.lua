-- The suffix of a shape, as routing/model/request.py writes it: terms, and the run time behind them.

-- The suffix of a shape without its first comma, nil where the shape has none.
local function suffix_of(shape)
  return string.match(shape, ',([|?+$^~].*)$')
end

-- The tenant of the jobs of a shape.
local function tenant_of(shape)
  return string.find(shape, ',$', 1, true) and string.match(shape, ',%$([^,]*)') or 'default'
end

-- The expected run time of the jobs of a shape in milliseconds, nil where it is unknown.
local function expected_of(shape)
  return tonumber(string.match(shape, ',~(%d+)$') or nil)
end

-- The milliseconds by which a job of a shape has ended, nil where they are unknown.
local function bound_of(shape)
  return tonumber(string.match(shape, ',%^(%d+),~%d+$') or string.match(shape, ',~(%d+)$') or nil)
end

-- True if a worker meets the conditions of a shape, has registered its task, and does not end before a job of that
-- shape has ended.
local function takes(book, shape)
  local conditions = conditions_of(shape)
  return (not conditions or allows(conditions, book.worker, book.labels)) and knows(book.tasks, shape)
    and (not book.left or (bound_of(shape) or 0) <= book.left)
end
