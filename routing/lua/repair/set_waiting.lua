#!lua flags=allow-oom
-- Does: sets the number of jobs that wait here to a given sum, unless it changed meanwhile.
-- KEYS: none; by name: epoch
-- ARGV: epoch, run_id, expected (as read with the queues), sum
-- Replies: {ok} | {changed} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
if facts.waiting ~= tonumber(expected) then
  return {'changed'}
end
redis.call('HSET', KEY.epoch, 'waiting', sum)
return {'ok'}
