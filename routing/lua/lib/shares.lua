-- The shares of few tenants, which are compared where a job comes.

-- The shares of tenants of which few are compared: `turn_of` reads the use of each. Nil where tenants are not in use.
local function open_sharing(facts)
  return facts.tenants and {turns = {}, total = numbers_of(KEY.totals), used = {}, rules = {}, past = {}, few = true}
end

-- Read what a tenant holds of the resources that count.
local function read_use(sharing, tenant)
  local names, fields, used, rule = {}, {}, {}, sharing.rules[tenant]
  for _, amounts in ipairs({sharing.total, rule and rule.nominal or {}, rule and rule.quota or {}}) do
    for name in pairs(amounts) do
      names[#names + 1], fields[#fields + 1] = name, tenant .. '/' .. name
    end
  end
  for i, amount in ipairs(#fields > 0 and redis.call('HMGET', KEY.used, unpack(fields)) or {}) do
    used[names[i]] = tonumber(amount or '0')
  end
  return used
end
