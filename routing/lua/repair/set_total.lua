#!lua flags=allow-oom
-- Does: sets the sum of the allocated CPUs to a given sum, unless an admission or release came between.
-- KEYS: none; by name: epoch, allocated, allocated_cpus
-- ARGV: epoch, run_id, expected (millicores, as read with the books; '' where it is missing), sum (millicores)
-- Replies: {ok} | {changed} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
if (redis.call('GET', KEY.allocated) or '') ~= expected then
  return {'changed'}
end
redis.call('SET', KEY.allocated, sum)
redis.call('SET', KEY.allocated_cpus, cpus_text(tonumber(sum)))
return {'ok'}
