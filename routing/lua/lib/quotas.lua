-- Quotas of tenants now, and the alternatives that they leave.

-- The rule of a shape's tenant where it has a quota, else nil, and what the tenant holds of the resources in it.
local function quota_of(facts, shape)
  local tenant = facts.tenants and tenant_of(shape)
  local rule = tenant and parse_rule(redis.call('HGET', KEY.tenants, tenant) or nil)
  if not rule or not next(rule.quota) then
    return nil
  end
  local used = {}
  for name in pairs(rule.quota) do
    used[name] = tonumber(redis.call('HGET', KEY.used, tenant .. '/' .. name) or '0')
  end
  return rule, used
end

-- These alternatives, with false for those that a quota holds back. Without a rule there is none.
local function allowed_options(rule, used, options)
  if not rule then
    return options
  end
  local allowed = {}
  for number, amounts in ipairs(options) do
    allowed[number] = not is_beyond_quota(rule, used, amounts) and amounts
  end
  return allowed
end

-- The alternatives of a shape, with false for those that the quota of its tenant holds back now.
local function options_now(facts, shape)
  local rule, used = quota_of(facts, shape)
  return allowed_options(rule, used, options_of(shape))
end

-- True if one of these alternatives is not held back.
local function has_option(options)
  for _, amounts in ipairs(options) do
    if amounts then
      return true
    end
  end
  return false
end

-- The first waiting shapes of which the quota of a tenant held back an alternative until jobs with these amounts ended,
-- and holds it back no more. `shape`: that of one of these jobs.
local function shapes_below_quota(facts, shape, ended)
  local rule, used = quota_of(facts, shape)
  local shapes, before = {}, {}
  for name, amount in pairs(used or {}) do
    before[name] = amount + (ended[name] or 0)
  end
  for _, waiting in ipairs(rule and redis.call('ZRANGE', shapes_beside(shape), 0, LIMIT.few - 1) or {}) do
    for _, amounts in ipairs(options_of(waiting)) do
      if is_beyond_quota(rule, before, amounts) and not is_beyond_quota(rule, used, amounts) then
        shapes[#shapes + 1] = waiting
        break
      end
    end
  end
  return shapes
end
