#!lua flags=allow-oom
-- Does: notes that Postgres holds a successor (retry, replace) of a job's attempt that is admitted or running.
-- KEYS: none; by name: job
-- ARGV: job, digest (of the successor's message)
-- Replies: {ok} | {missing} where there is no such attempt, or it is that of the successor itself: Postgres was quicker
-- Cost: constant
-- Repeat: harmless
local id, digest = ARG.job, ARG.digest
local fields = redis.call('HMGET', KEY.job .. id, 'state', 'digest')
if (fields[1] ~= 'admitted' and fields[1] ~= 'running') or fields[2] == digest then
  return {'missing'}
end
redis.call('HSET', KEY.job .. id, 'successor', '1')
return {'ok'}
