#!lua flags=allow-oom
-- Does: notes that a job held by a worker was revoked. Should the job come back, it ends, and a claim of it is told so.
-- KEYS: none; by name: epoch, job
-- ARGV: epoch, run_id, job
-- Replies: {held, worker} | {free} (no worker holds it) | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
local epoch, run_id, id = ARG.epoch, ARG.run_id, ARG.job

local no = refused(epoch, run_id)
if no then
  return no
end
local fields = redis.call('HMGET', KEY.job .. id, 'state', 'worker')
if fields[1] ~= 'admitted' and fields[1] ~= 'running' then
  return {'free'}
end
redis.call('HSET', KEY.job .. id, 'revoked', '1')
return {'held', fields[2] or ''}
