#!lua flags=allow-oom
-- Does: lets jobs in whose entries of an older epoch Postgres has.
-- KEYS: none; by name: epoch, carried
-- ARGV: epoch, run_id, then for each job (at most 1,000): its id
-- Replies: {ok, jobs that were kept out until now} | {cold} | {epoch, current}
-- Cost: one command
-- Repeat: harmless
local epoch, run_id = ARGV[1], ARGV[2]

local no = refused(epoch, run_id)
if no then
  return no
end
return {'ok', int(redis.call('SREM', KEY.carried, unpack(ARGV, 3)))}
