#!lua flags=allow-oom
-- Does: sets what the jobs of tenants hold, as far as nothing was admitted or released meanwhile.
-- KEYS: none; by name: epoch, used
-- ARGV: epoch, run_id, then for each amount: field (tenant/resource), expected (as read before the jobs; 0 where it is
--   missing), sum
-- Replies: {ok, changed (number of amounts)} | {cold} | {epoch, current}
-- Cost: two commands an amount
-- Repeat: harmless
local changed = 0
for i = EACH.first, #ARGV, EACH.step do
  local field, sum = ARGV[i + EACH.field], ARGV[i + EACH.sum]
  if (redis.call('HGET', KEY.used, field) or '0') == ARGV[i + EACH.expected] then
    if sum == '0' then
      redis.call('HDEL', KEY.used, field)
    else
      redis.call('HSET', KEY.used, field, sum)
    end
    changed = changed + 1
  end
end
return {'ok', int(changed)}
