#!lua flags=allow-oom
-- Does: notes that an epoch has all jobs that Postgres had when it was opened.
-- KEYS: none; by name: epoch
-- ARGV: epoch, run_id
-- Replies: {ok} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
redis.call('HDEL', KEY.epoch, 'rebuilding')
return {'ok'}
