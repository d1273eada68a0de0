-- The alternatives of a shape, as routing/model/request.py writes them: ,|<first>|<second>, and ,|2|<first>|<second> in
-- the shape of a job that holds the second one. A shape without them costs no command more.

-- The list of a shape's alternatives, nil where it has none.
local function listed(shape)
  return string.find(shape, ',|', 1, true) and string.gsub(string.match(shape, ',|([^,]*)'), '^%d+|', '')
end

-- Amounts as text with `alone`, in the order of the bytes of their names.
local function with_alone(text)
  local parts, unplaced = {}, 'alone'
  for name, amount in string.gmatch(text, '([^=,]+)=(%d+)') do
    if unplaced and is_before(unplaced, name) then
      parts[#parts + 1], unplaced = 'alone=1', nil
    end
    parts[#parts + 1] = name .. '=' .. amount
  end
  if unplaced then
    parts[#parts + 1] = 'alone=1'
  end
  return table.concat(parts, ',')
end

-- The amounts of each alternative of a shape, in order. A shape without alternatives has one. Where its own request
-- runs alone, all do: it is the last attempt.
local function options_of(shape)
  local amounts, list = amounts_of(shape), listed(shape)
  if not list then
    return {amounts}
  end
  local options = {}
  for text in string.gmatch(list, '[^|]+') do
    local option = {alone = amounts.alone}
    for name, amount in string.gmatch(text, '([^!;]+)!(%d+)') do
      option[name] = tonumber(amount)
    end
    options[#options + 1] = option
  end
  return options
end

-- The shape of a job that holds one of its alternatives; with 0 the shape under which it waits.
local function holding(shape, number)
  local list = listed(shape)
  if not list then
    return shape
  end
  local texts = {}
  for text in string.gmatch(list, '[^|]+') do
    texts[#texts + 1] = text
  end
  local text = string.gsub(string.gsub(texts[math.max(1, number)], '!', '='), ';', ',')
  if amounts_of(shape).alone and not amounts_of(text).alone then
    text = with_alone(text)
  end
  local term = '|' .. (number > 0 and int(number) .. '|' or '') .. list
  return table.concat({text, task_of(shape) or term, task_of(shape) and term}, ',') ..
    string.match(shape, ',|[^,]*(.*)$')
end

-- The number of the alternative that a job holds, nil where its shape has none.
local function number_held(shape)
  return string.find(shape, ',|', 1, true) and string.match(shape, ',|(%d+)|')
end

-- True if a worker has room for one of these alternatives. One that is false is held back.
local function fits_any(book, options)
  for _, amounts in ipairs(options) do
    if amounts and fits(book, amounts) then
      return true
    end
  end
  return false
end

-- True if a worker would have room for one of these alternatives with nothing allocated there.
local function fits_any_empty(book, options)
  for _, amounts in ipairs(options) do
    if amounts and fits_empty(book, amounts) then
      return true
    end
  end
  return false
end
