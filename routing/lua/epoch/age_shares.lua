#!lua flags=allow-oom
-- Does: lets the past use of tenants decay by the time since the last call, and sets the capacity of all workers.
-- KEYS: none; by name: epoch, past, totals
-- ARGV: epoch, run_id, then for each resource: resource, amount
-- Replies: {ok} | {cold} | {epoch, current}
-- Cost: a command a tenant with past use, and one a resource
-- Repeat: harmless: the use decays by the time that passed
local now, aged = clock(), tonumber(redis.call('HGET', KEY.epoch, 'aged') or nil)
-- The clock may have been set back since.
local left = LIMIT.share_time > 0 and math.exp(-math.max(0, now - (aged or now)) / LIMIT.share_time) or 0
for tenant, use in pairs(numbers_of(KEY.past)) do
  if use * left < 0.000001 then
    redis.call('HDEL', KEY.past, tenant)
  else
    redis.call('HSET', KEY.past, tenant, string.format('%.12f', use * left))
  end
end
redis.call('HSET', KEY.epoch, 'aged', int(now))
redis.call('UNLINK', KEY.totals)
for i = EACH.first, #ARGV, EACH.step do
  redis.call('HSET', KEY.totals, ARGV[i + EACH.resource], ARGV[i + EACH.amount])
end
return {'ok'}
