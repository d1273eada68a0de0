#!lua flags=allow-oom
-- Does: finds shapes whose heads run low while jobs of them stay in Postgres, of which nobody was told.
-- KEYS: none; by name: epoch, border, low, shapes, wait
-- ARGV: epoch, run_id, seen (shapes that were looked at)
-- Replies: {ok, looked (number of shapes looked at)} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.shapes shapes are looked at, with at most six commands each
-- Repeat: harmless
seen = tonumber(seen)
local rows = redis.call('ZRANGE', KEY.border, int(seen), int(seen + LIMIT.shapes - 1), 'WITHSCORES')
for i = 1, #rows, 2 do
  if wanted(rows[i], rows[i + 1]) > 0 then
    redis.call('SADD', KEY.low, rows[i])
  end
end
return {'ok', int(#rows / 2)}
