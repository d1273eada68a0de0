#!lua flags=allow-oom
-- Does: sets what the jobs of tenants hold, as far as nothing was admitted or released meanwhile.
-- KEYS: none; by name: epoch, used, stream
-- ARGV: epoch, run_id, newest (id of the newest entry of the stream, as read before the use), then for each amount:
--   field (tenant/resource), expected (as read before the jobs; 0 where it is missing), sum
-- Replies: {ok, changed (number of amounts)} | {cold} | {epoch, current}
-- Cost: a command, and two for each amount
-- Repeat: harmless
-- An end writes an entry, so without a new one the use of a tenant has only grown, and an admission shows in it.
local info, last = redis.pcall('XINFO', 'STREAM', KEY.stream), '0-0'
for i = 1, #info, 2 do
  last = info[i] == 'last-generated-id' and info[i + 1] or last
end
if last ~= newest then
  return {'ok', 0}
end
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
