-- Classes of free amounts, by which the indexes of resources are sorted.

-- The class of an amount, as routing/policy/amount_classes.py has it. Below 16 each amount is a class of its own.
-- Above, four classes make twice the amount.
local function class_of(amount)
  if amount < 16 then
    return math.max(0, math.floor(amount))
  end
  local _, exponent = math.frexp(amount)
  return 4 * exponent + math.floor(amount / 2 ^ (exponent - 3)) - 8
end

-- The score of a worker in the index of a resource: its free CPUs, above them the class of its free amount. So the
-- index has the workers of each class in order of their free CPUs. Queues have no amounts.
local function place_score(book, name, free)
  if string.sub(name, 1, 6) == 'queue:' then
    return int(free)
  end
  return int(class_of(room(book, name)) * LIMIT.span + math.min(free, LIMIT.span - 1))
end
