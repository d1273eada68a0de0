#!lua flags=allow-oom
-- Does: notes that an epoch has all jobs that Postgres had when it was opened.
-- KEYS: none; by name: epoch
-- ARGV: epoch, run_id
-- Replies: {ok} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
local epoch, run_id = ARG.epoch, ARG.run_id

local no = refused(epoch, run_id)
if no then
  return no
end
redis.call('HDEL', KEY.epoch, 'rebuilding')
return {'ok'}
