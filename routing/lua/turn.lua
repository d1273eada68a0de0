#!lua flags=allow-oom
-- Does: gives one caller in each interval the turn for a duty; also when the server is full, since duties free memory.
-- KEYS: none; by name: duty
-- ARGV: duty, caller, interval (ms)
-- Replies: {ok, 1 when it is the caller's turn, else 0}
-- Cost: constant
-- Repeat: harmless: the turn is taken by then, and duties may be done twice
local duty, caller, interval = ARGV[1], ARGV[2], ARGV[3]
local taken = redis.call('SET', KEY.duty .. duty, caller, 'NX', 'PX', interval)
return {'ok', taken and '1' or '0'}
