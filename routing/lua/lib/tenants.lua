-- Use, shares and quotas of tenants, by the rules of routing/policy/tenants.py.
--
-- `facts.tenants` is the mark of the epoch that tenants are in use: a rule was made, or a job named a tenant. Without
-- it, nothing here sends a command. From then on an admitted job is `counted`: its tenant's use has its amounts.

-- True while tenants are in use. The first job that names one begins that.
local function has_tenants(facts, shape)
  if not facts.tenants and string.find(shape, ',$', 1, true) then
    facts.tenants = '1'
    redis.call('HSET', KEY.epoch, 'tenants', '1')
  end
  return facts.tenants
end

-- True if an amount is a share of a resource. A queue is none, nor is being alone.
local function is_counted(name)
  return name ~= 'alone' and string.sub(name, 1, 6) ~= 'queue:'
end

-- Add the amounts of a shape so many times to the use of its tenant.
local function count_use(shape, times)
  local tenant = tenant_of(shape)
  for name, amount in pairs(amounts_of(shape)) do
    if is_counted(name) then
      local field = tenant .. '/' .. name
      if redis.call('HINCRBY', KEY.used, field, int(times * amount)) == 0 then
        redis.call('HDEL', KEY.used, field)
      end
    end
  end
end

-- The largest part of any resource that these amounts are of the capacity of all workers.
local function dominant_share(amounts, total)
  local largest = 0
  for name, amount in pairs(amounts) do
    if is_counted(name) and (total[name] or 0) > 0 then
      largest = math.max(largest, amount / total[name])
    end
  end
  return largest
end

-- A hash of numbers as a table.
local function numbers_of(key)
  local flat, numbers = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do
    numbers[flat[i]] = tonumber(flat[i + 1])
  end
  return numbers
end

-- Give back the use of a counted job whose attempt is over, and add its run time to the past use of its tenant.
local function give_use_back(job, now)
  job.counted = nil
  count_use(job.shape, -1)
  local admitted = tonumber(job.admitted or '') or 0
  if LIMIT.share_time > 0 and admitted > 0 and now > admitted then
    local share = dominant_share(amounts_of(job.shape), numbers_of(KEY.totals))
    if share > 0 then
      redis.call('HINCRBYFLOAT', KEY.past, tenant_of(job.shape), share * (now - admitted) / LIMIT.share_time)
    end
  end
end

-- A rule as `set_controls` stores it: weight, nominal share and quota; nil where the tenant has none.
local function parse_rule(text)
  local weight, nominal, quota = string.match(text or '', '^(%d+);([^;]*);([^;]*)$')
  return weight and {weight = tonumber(weight), nominal = amounts_of(nominal), quota = amounts_of(quota)}
end

-- True if these amounts would make a tenant hold more than its quota. `used`: what it holds, by resource.
local function is_beyond_quota(rule, used, amounts)
  for name, most in pairs(rule and rule.quota or {}) do
    if (amounts[name] or 0) > 0 and (used[name] or 0) + amounts[name] > most then
      return true
    end
  end
  return false
end
