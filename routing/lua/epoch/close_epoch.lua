#!lua flags=allow-oom
-- Does: closes the books for the process that opens a new epoch, removes keys of the older one, and notes the jobs that
--   nobody may bring in yet.
-- KEYS: none; by name: epoch, carried
-- ARGV: opening (the new epoch), run_id, step (begin: close the books for this epoch; remove and carry: the books must
--   still be closed for it), then for each key to remove or job to carry over (at most 1,000): name
-- Replies: {ok} | {cold} where the books are closed for nobody | {epoch, current} where a newer one is opened
--   | {foreign, database} where the books are those of another database
-- Cost: at most five commands, and the time to unlink the keys
-- Repeat: harmless

local current = redis.call('HMGET', KEY.epoch, 'epoch', 'opening', 'database')
local _, database = parted(run_id)
if current[3] and database ~= '' and current[3] ~= database then
  return {'foreign', current[3]}
end
local newest = math.max(tonumber(current[1] or 0), tonumber(current[2] or 0))
if newest > tonumber(opening) or current[1] == opening then
  return {'epoch', int(newest)}
end
if step == 'begin' then
  -- The run of the server in which the books were opened stays, because it tells if the stream is whole.
  redis.call('HDEL', KEY.epoch, 'epoch', 'rebuilding')
  redis.call('HSET', KEY.epoch, 'opening', opening, 'format', LIMIT.format)
  if database ~= '' then
    redis.call('HSET', KEY.epoch, 'database', database)
  end
elseif current[2] ~= opening then
  -- The ledger was emptied meanwhile: the next process that looks begins anew.
  return {'cold'}
elseif step == 'remove' then
  redis.call('UNLINK', unpack(ARGV, EACH.first))
else
  redis.call('SADD', KEY.carried, unpack(ARGV, EACH.first))
  redis.call('HSET', KEY.epoch, 'carries', '1')
end
return {'ok'}
