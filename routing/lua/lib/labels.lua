-- The place in the suffix of a shape, as routing/policy/labels.py writes it: ?@<worker>/<key>:<operator>:<values> for
-- the conditions on its worker, +exclusive and +spread for the placement.

-- The conditions of a shape on its worker, nil where it has none.
local function conditions_of(shape)
  return string.find(shape, ',?', 1, true) and string.match(shape, ',%?([^,]+)')
end

-- The only worker on which the jobs of a shape may run, nil for any.
local function named_worker(conditions)
  return conditions and string.match(conditions, '^@([^/]+)')
end

-- True if the jobs of a shape go where most CPUs are free.
local function is_spread(shape)
  return string.find(shape, ',+', 1, true) and string.find(shape, ',%+[^,]*spread') ~= nil
end

-- True if the value of a label, nil for none, meets a condition.
local function holds(value, operator, asked)
  if operator == 'in' or operator == 'not' then
    local listed = value and string.find(':' .. asked .. ':', ':' .. value .. ':', 1, true)
    return (operator == 'in') == (listed ~= nil)
  end
  local number, other = value and string.match(value, '^%-?%d+%.?%d*$') and tonumber(value), tonumber(asked)
  if not number then
    return false
  elseif operator == 'ge' then
    return number >= other
  elseif operator == 'gt' then
    return number > other
  elseif operator == 'le' then
    return number <= other
  end
  return number < other
end

-- True if a worker with these labels, nil for none, meets conditions.
local function allows(conditions, worker, labels)
  local between = ',' .. (labels or '') .. ','
  for condition in string.gmatch(conditions, '[^/]+') do
    local name = string.match(condition, '^@(.+)')
    if name and name ~= worker then
      return false
    elseif not name then
      local key, operator, asked = string.match(condition, '^([^:]+):(%a+):(.+)$')
      local _, at = string.find(between, ',' .. key .. '=', 1, true)
      if not holds(at and string.match(between, '^[^,]*', at + 1) or nil, operator, asked) then
        return false
      end
    end
  end
  return true
end
