#!lua flags=allow-oom
-- Does: sets the sum of the allocated CPUs to a given sum, unless an admission or release came between.
-- KEYS: none; by name: epoch, allocated, allocated_cpus
-- ARGV: epoch, run_id, expected (millicores, as read with the books; '' where it is missing), sum (millicores)
-- Replies: {ok} | {changed} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
local epoch, run_id, expected, sum = ARG.epoch, ARG.run_id, ARG.expected, ARG.sum

local no = refused(epoch, run_id)
if no then
  return no
end
if (redis.call('GET', KEY.allocated) or '') ~= expected then
  return {'changed'}
end
redis.call('SET', KEY.allocated, sum)
redis.call('SET', KEY.allocated_cpus, cpus_text(tonumber(sum)))
return {'ok'}
