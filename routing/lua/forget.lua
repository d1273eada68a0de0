#!lua flags=allow-oom
-- Does: drops stream entries that Postgres has.
-- KEYS: none; by name: stream, job
-- ARGV: for each entry: entry, job ('' where the job has ended: its tombstone names no entry)
-- Replies: {ok, dropped}
-- Cost: two or three commands an entry
-- Repeat: harmless
local dropped = 0
for i = 1, #ARGV, 2 do
  local entry, id = ARGV[i], ARGV[i + 1]
  dropped = dropped + redis.call('XDEL', KEY.stream, entry)
  if id ~= '' and redis.call('HGET', KEY.job .. id, 'entry') == entry then
    redis.call('HDEL', KEY.job .. id, 'entry', 'noted')
  end
end
return {'ok', int(dropped)}
