-- Does: opens an epoch on books that were emptied before.
-- KEYS: none; by name: epoch, allocated, allocated_cpus
-- ARGV: epoch, run_id
-- Replies: {ok} | {epoch, current} where a newer one is open
-- Cost: constant
-- Repeat: harmless
local epoch, run_id = ARGV[1], ARGV[2]
local current = redis.call('HGET', KEY.epoch, 'epoch')
if current and tonumber(current) > tonumber(epoch) then
  return {'epoch', current}
end
redis.call('SET', KEY.allocated, '0')
redis.call('SET', KEY.allocated_cpus, '0')
redis.call('HSET', KEY.epoch, 'epoch', epoch, 'run_id', run_id, 'opened', int(clock()))
return {'ok'}
