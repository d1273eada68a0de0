#!lua flags=allow-oom
-- Does: begins to fetch jobs that stay in Postgres: forgets which were left there before, and tells the shapes whose
--   heads run low.
-- KEYS: none; by name: epoch, border, left, low, shapes, wait
-- ARGV: epoch, run_id
-- Replies: {ok, then for each of these shapes: shape, wanted (jobs to be fetched), before (only jobs of a lesser order
--   are fetched, since enough wait here from it on; '': none)} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.shapes shapes are looked at, with at most seven commands each
-- Repeat: harmless: the caller reads the rows that stay behind after it
redis.call('UNLINK', KEY.left)
local reply = {'ok'}
for _, shape in ipairs(redis.call('SRANDMEMBER', KEY.low, LIMIT.shapes)) do
  local border = redis.call('ZSCORE', KEY.border, shape)
  local number, share = 0, nil
  if border then
    number, share = wanted(shape, border)
  end
  if number > 0 then
    -- Jobs of higher priorities move the border before jobs that are here. These would be fetched over and over with
    -- others behind them.
    local n, last = #reply, redis.call('ZRANGE', KEY.wait .. shape, int(share - 1), int(share - 1), 'WITHSCORES')
    reply[n + 1], reply[n + 2], reply[n + 3] = shape, int(number), last[2] or ''
  else
    redis.call('SREM', KEY.low, shape)
  end
end
return reply
