-- The turns of tenants in a pass over a worker: the first shape of the tenant that is furthest below its share is next.

-- The turn of a tenant among jobs of one priority, as `Sharing.turn` has it. `turn` has its rule and use.
local function note_level(sharing, turn)
  local rule, share = turn.rule, dominant_share(turn.used, sharing.total) + turn.past
  turn.level = math.floor(share / (rule and rule.weight or 1) * 1000000 + 0.5)
  turn.borrows = not (rule and next(rule.nominal))
  for name, amount in pairs(rule and rule.nominal or {}) do
    turn.borrows = turn.borrows or (turn.used[name] or 0) >= amount
  end
end

-- Read the rules and the past use of tenants.
local function read_tenants(sharing, tenants)
  local rules, past = redis.call('HMGET', KEY.tenants, unpack(tenants)), redis.call('HMGET', KEY.past, unpack(tenants))
  for i, tenant in ipairs(tenants) do
    sharing.rules[tenant], sharing.past[tenant] = parse_rule(rules[i] or nil) or false, tonumber(past[i] or '0')
  end
end

-- The turn of a tenant, with its shapes that may start.
local function turn_of(sharing, tenant)
  local turn = sharing.turns[tenant]
  if not turn then
    if sharing.rules[tenant] == nil then
      read_tenants(sharing, {tenant})
    end
    if sharing.few then
      sharing.used[tenant] = read_use(sharing, tenant)
    end
    turn = {shapes = {}, rule = sharing.rules[tenant], used = sharing.used[tenant] or {}, past = sharing.past[tenant],
      lists = {}}
    note_level(sharing, turn)
    sharing.turns[tenant] = turn
  end
  return turn
end

-- Note that a job of a shape started. Without tenants nothing is to be noted.
local function note_use(sharing, shape, amounts)
  if not sharing then
    return
  end
  local turn = turn_of(sharing, tenant_of(shape))
  for name, amount in pairs(amounts) do
    if is_counted(name) then
      turn.used[name] = (turn.used[name] or 0) + amount
    end
  end
  note_level(sharing, turn)
end

-- The alternatives of a shape, with false for those that the quota of its tenant holds back.
local function within_quota(sharing, shape, options)
  local turn = sharing and turn_of(sharing, tenant_of(shape))
  return turn and allowed_options(turn.rule, turn.used, options) or options
end

-- True if the first job of a turn comes before that of another, by priority, then by turn, then by order.
local function comes_before(turn, order, other, other_order)
  local rank, other_rank = math.floor(order / LIMIT.submissions), math.floor(other_order / LIMIT.submissions)
  if rank ~= other_rank then
    return rank < other_rank
  elseif turn.borrows ~= other.borrows then
    return other.borrows
  elseif turn.level ~= other.level then
    return turn.level < other.level
  end
  return order < other_order
end

-- Read the next page of a list.
local function read_page(list)
  local from = list.rows and '(' .. list.rows[#list.rows] or '-inf'
  list.rows = redis.call('ZRANGEBYSCORE', list.key, from, '+inf', 'WITHSCORES', 'LIMIT', 0, LIMIT.few)
  list.at = 1
end

-- The order of the next shape in the lists of a turn, and its list; nil where they have no more. The list of a tenant
-- is not read before its turn: its `head` is known.
local function peek(turn)
  local first, order
  for _, list in ipairs(turn.lists) do
    if not list.head and (not list.rows or (list.at > #list.rows and #list.rows == 2 * LIMIT.few)) then
      read_page(list)
    end
    local at = list.head or tonumber(list.rows[list.at + 1])
    if at and (not order or at < order) then
      first, order = list, at
    end
  end
  return order, first
end
