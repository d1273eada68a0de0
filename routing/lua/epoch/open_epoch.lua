#!lua flags=allow-oom
-- Does: opens an epoch on books that were emptied before, for the caller's database in Postgres.
-- KEYS: none; by name: epoch, allocated, allocated_cpus, cordons, paused, withheld, tenants, used
-- ARGV: opening (the new epoch), run_id, version (number of the newest action of an operator), then for each control:
--   kind (cordon, pause or tenant), name, value (as in set_controls)
-- Replies: {ok, now (ms)} | {epoch, current} where a newer one is open, or is being opened | {foreign, database} where
--   the books are those of another database
-- Cost: a command a control
-- Repeat: harmless: jobs that were admitted in this epoch meanwhile stay
local server_run, database = parted(run_id)
local current = redis.call('HMGET', KEY.epoch, 'epoch', 'run_id', 'opening', 'database')
if current[4] and database ~= '' and current[4] ~= database then
  return {'foreign', current[4]}
end
local newest = math.max(tonumber(current[1] or 0), tonumber(current[3] or 0))
if newest > tonumber(opening) then
  return {'epoch', int(newest)}
end
local now = clock()
if current[1] == opening and current[2] == server_run then
  return {'ok', int(now)}
end
redis.call('SET', KEY.allocated, '0')
redis.call('SET', KEY.allocated_cpus, '0')
-- Nothing starts in this epoch that an operator holds back. Each worker finds its cordon when it registers.
redis.call('UNLINK', KEY.cordons, KEY.paused, KEY.withheld, KEY.tenants, KEY.used)
for i = EACH.first, #ARGV, EACH.step do
  redis.call('HSET', control_key(ARGV[i + EACH.kind]), ARGV[i + EACH.name], ARGV[i + EACH.value])
end
redis.call('HDEL', KEY.epoch, 'opening', 'waiting', 'stay', 'tight', 'reserved', 'tenants')
mark_controls()
redis.call('HSET', KEY.epoch, 'epoch', opening, 'run_id', server_run, 'opened', int(now), 'rebuilding', '1',
  'format', LIMIT.format, 'controls', version)
if database ~= '' then
  redis.call('HSET', KEY.epoch, 'database', database)
end
-- Watchers of jobs look at their rows anew, because nobody told them of changes since the books were lost.
redis.call('PUBLISH', KEY.epoch, opening)
return {'ok', int(now)}
