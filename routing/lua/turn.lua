#!lua flags=allow-oom
-- Does: gives one caller in each interval the turn for a duty; also when the server is full, since duties free memory.
-- KEYS: none; by name: duty
-- ARGV: duty, caller, interval (ms)
-- Replies: {ok, 1 when it is the caller's turn, else 0}
-- Cost: constant
-- Repeat: harmless: the turn is taken by then, and duties may be done twice
local duty, caller, interval = ARGV[1], ARGV[2], ARGV[3]
local taken = redis.call('SET', KEY.duty .. duty, caller, 'NX', 'PX', interval)
if not taken and redis.call('PTTL', KEY.duty .. duty) > tonumber(interval) then
  -- An expiry is a time, and the server's clock was set back since: nobody would have a turn until it is that late again.
  taken = redis.call('SET', KEY.duty .. duty, caller, 'PX', interval)
end
return {'ok', taken and '1' or '0'}
