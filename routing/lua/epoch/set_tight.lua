#!lua flags=allow-oom
-- Does: notes whether the memory of this server is short, so that jobs which find no room stay in Postgres.
-- KEYS: none; by name: epoch
-- ARGV: epoch, run_id, tight (1: it is short, 0: it is not)
-- Replies: {ok} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
if tight == '1' then
  redis.call('HSET', KEY.epoch, 'tight', '1')
else
  redis.call('HDEL', KEY.epoch, 'tight')
end
return {'ok'}
