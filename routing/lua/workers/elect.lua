#!lua flags=allow-oom
-- Does: gives the lease on the duties to one worker at a time, renews it, and brings its holder the duties that others
--   asked for.
-- KEYS: none; by name: runner, asked, epoch, book
-- ARGV: caller (an incarnation), worker (its name), database (of the caller, '' where it is not known), fence (of the
--   caller's lease, 0: it has none), term (ms; 0: give it back), then for each duty that it asks for: duty
-- Replies: {elected, epoch (of the ledger, 0: none), book (1: its worker has one), fence, then for each duty that was
--   asked for: duty} | {other (has the lease, or nobody has), epoch, book}
-- Cost: constant, a command for each duty asked for, and at most LIMIT.shapes duties in the reply
-- Repeat: harmless: the holder keeps its lease and its fence; each request for a duty is handed over once
fence, term = tonumber(fence), tonumber(term)
local now = clock()
local lease = redis.call('HMGET', KEY.runner, 'incarnation', 'fence', 'until')
local number, over = tonumber(lease[2] or '0'), tonumber(lease[3] or '0')
local epoch = redis.call('HGET', KEY.epoch, 'epoch') or '0'
local book = int(redis.call('EXISTS', KEY.book .. worker))
local mine = fence > 0 and lease[1] == caller and number == fence
for i = EACH.first, #ARGV, EACH.step do
  redis.call('SADD', KEY.asked, ARGV[i + EACH.duty])
end
if term == 0 then
  if mine then
    redis.call('HSET', KEY.runner, 'until', int(now))
  end
  return {'other', epoch, book}
end
-- A worker of another database has lost its own Redis, and met these books at its address. It can do no duty for them.
local owner = redis.call('HGET', KEY.epoch, 'database')
if owner and database ~= '' and owner ~= database then
  return {'other', epoch, book}
end
-- A lease that lasts longer than the longest term was taken before the server's clock was set back: it may be taken
-- over.
if not (mine or over <= now or over > now + 2 * term) then
  return {'other', epoch, book}
end
if not mine then
  -- The new fence is above every fence of the books and of the caller, because the ledger may have been emptied.
  number = math.max(number, fence) + 1
end
redis.call('HSET', KEY.runner, 'incarnation', caller, 'fence', int(number), 'until', int(now + term))
-- There are fewer duties than LIMIT.shapes. Any names beyond that come with the next call.
return {'elected', epoch, book, int(number), unpack(redis.call('SPOP', KEY.asked, LIMIT.shapes))}
