#!lua flags=allow-oom
-- Does: drops stream entries that Postgres has. From then on the tombstone of an ended job has an expiry.
-- KEYS: none; by name: stream, job
-- ARGV: then for each entry: entry, job
-- Replies: {ok, dropped}
-- Cost: at most four commands an entry
-- Repeat: harmless
local dropped = 0
for i = EACH.first, #ARGV, EACH.step do
  local entry, id = ARGV[i + EACH.entry], ARGV[i + EACH.job]
  dropped = dropped + redis.call('XDEL', KEY.stream, entry)
  local job = redis.call('HMGET', KEY.job .. id, 'entry', 'state')
  if job[1] == entry then
    redis.call('HDEL', KEY.job .. id, 'entry', 'noted')
    if job[2] == 'ended' then
      redis.call('PEXPIRE', KEY.job .. id, LIMIT.tombstone)
    end
  end
end
return {'ok', int(dropped)}
