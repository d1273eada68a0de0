#!lua flags=allow-oom
-- Does: drops stream entries that Postgres has. From then on the tombstone of an ended job has an expiry.
-- KEYS: none; by name: stream, job
-- ARGV: then for each entry: entry, job
-- Replies: {ok, dropped}
-- Cost: at most three commands an entry, of which there are at most 1,000
-- Repeat: harmless
local entries = {}
for i = EACH.first, #ARGV, EACH.step do
  entries[#entries + 1] = ARGV[i + EACH.entry]
end
local dropped = redis.call('XDEL', KEY.stream, unpack(entries))
for i = EACH.first, #ARGV, EACH.step do
  drop_entry(ARGV[i + EACH.job], ARGV[i + EACH.entry])
end
return {'ok', int(dropped)}
