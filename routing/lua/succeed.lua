#!lua flags=allow-oom
-- Does: notes that Postgres holds a successor (retry, replace) of the attempt of a job that is admitted or running.
-- KEYS: none; by name: job
-- ARGV: job
-- Replies: {ok} | {missing}
-- Cost: constant
-- Repeat: harmless
local id = ARGV[1]
local state = redis.call('HGET', KEY.job .. id, 'state')
if state ~= 'admitted' and state ~= 'running' then
  return {'missing'}
end
redis.call('HSET', KEY.job .. id, 'successor', '1')
return {'ok'}
