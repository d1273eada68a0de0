-- The order in which a pass tries shapes, where tenants are in use.

-- Open the lists of all tenants with waiting jobs, with what they hold. Where a handful of shapes ask for few enough
-- CPUs, only these are looked at, and no other tenant is compared.
local function open_turns(tries, book, sharing)
  local free = int(room(book, 'cpus'))
  local small = redis.call('ZRANGEBYSCORE', KEY.asks .. 'cpus', '-inf', free, 'LIMIT', 0, LIMIT.few + 1)
  if #small <= LIMIT.few then
    return look_at_last(tries, book, small)
  end
  local heads = redis.call('ZRANGE', KEY.tenant_heads, 0, LIMIT.tenants - 1, 'WITHSCORES')
  local tenants = {'default'}
  for i = 1, #heads, 2 do
    tenants[#tenants + 1] = heads[i]
  end
  sharing.few = nil
  for field, amount in pairs(numbers_of(KEY.used)) do
    local tenant, name = string.match(field, '^([^/]*)/(.*)$')
    sharing.used[tenant] = sharing.used[tenant] or {}
    sharing.used[tenant][name] = amount
  end
  read_tenants(sharing, tenants)
  turn_of(sharing, 'default').lists = lists_of(book, false)
  for i = 1, #heads, 2 do
    turn_of(sharing, heads[i]).lists = {{key = KEY.shapes_of .. '$' .. heads[i], head = tonumber(heads[i + 1])}}
  end
end

-- Open the shapes that a pass tries, behind a cursor. `kept_row`: the only one, for which the worker was kept. Where
-- tenants are in use, the first pass goes by their turns. Where it looked at so many shapes that others may be left,
-- the next passes go through the rest in order.
local function open_tries(book, kept_row, after, sharing)
  local tries = {shapes = {}, seen = {}, looked = 0, after = after, cursor = after, more = not kept_row,
    sharing = sharing, by_turns = sharing and not kept_row and after == '-inf'}
  if tries.by_turns then
    open_turns(tries, book, sharing)
  elseif tries.more then
    tries.lists = lists_of(book, sharing and true)
  end
  if kept_row then
    look_at(tries, book, kept_row[1], tonumber(kept_row[2]))
  end
  return tries
end

-- The turn that comes first, and the list in which its next shape stands; nil where that shape was looked at already.
local function first_turn(tries)
  local first, first_order, first_list
  for _, turn in pairs(tries.sharing.turns) do
    local order, list = turn.shapes[1] and turn.shapes[1].order, nil
    if tries.more then
      local at, behind = peek(turn)
      if at and (not order or at < order) then
        order, list = at, behind
      end
    end
    if order and (not first or comes_before(turn, order, first, first_order)) then
      first, first_order, first_list = turn, order, list
    end
  end
  return first, first_list
end

-- Take the next shape to try, by the turns of the tenants, or nil.
local function next_by_turns(tries, book)
  while true do
    if tries.more and room(book, 'slots') < 1 then
      -- A full worker may still be kept for a job that must be alone.
      look_at_last(tries, book, redis.call('ZRANGEBYSCORE', KEY.asks .. 'cpus', '-inf', '(0', 'LIMIT', 0, LIMIT.shapes))
    elseif tries.more and tries.looked >= LIMIT.few and not tries.asked then
      tries.asked = true
      look_at_small(tries, book)
    end
    local turn, list = first_turn(tries)
    if not turn then
      tries.more = false
      return nil
    elseif not list then
      return table.remove(turn.shapes, 1)
    elseif tries.looked >= LIMIT.shapes then
      -- No order is negative.
      tries.cursor = '-1'
      return nil
    elseif list.head then
      list.head = nil
      read_page(list)
    else
      local shape, order = list.rows[list.at], tonumber(list.rows[list.at + 1])
      list.at = list.at + 2
      look_at(tries, book, shape, order)
    end
  end
end

-- Set a shape back until `bring_back`: it may not pass the reserved one. Without turns, only if it must be alone.
local function set_back(tries, row)
  if tries.by_turns or row.options[1].alone then
    tries.behind = tries.behind or {}
    table.insert(tries.behind, row)
  end
end

-- Try the shapes again that were set back, after a start by which more may pass: that of the reserved job, or of
-- another of its tenant, whose turn comes later by it.
local function bring_back(tries, book, shape)
  if tries.behind and (not book.kept or tenant_of(book.kept) == tenant_of(shape)) then
    for _, row in ipairs(tries.behind) do
      keep_shape(tries, row)
    end
    tries.behind = nil
  end
end

-- Take the next shape to try, or nil.
local function next_of(tries, book)
  if tries.by_turns then
    return next_by_turns(tries, book)
  end
  return next_shape(tries, book)
end
