#!lua flags=allow-oom
-- Does: makes cordons, pauses and rules of tenants those of Postgres. A cordoned worker, and a paused part of the
--   backlog, start nothing from this step on.
-- KEYS: none; by name: epoch, cordons, paused, tenants, book, kept, free, free_of, view, allocated, allocated_cpus
-- ARGV: epoch, run_id, version (number of the newest action of an operator), last (1: the ledger has all of this
--   version now), then for each change: kind (cordon, pause or tenant), name (of the worker, or platform, queue and
--   name, task and name, or of the tenant), value (its status, 1, or the rule; '': it is taken back)
-- Replies: {ok} | {older} where the ledger has a newer version | {cold} | {epoch, current}
-- Cost: at most ten commands a change, and one for each index of free CPUs in which a worker stands
-- Repeat: harmless
if tonumber(version) < tonumber(redis.call('HGET', KEY.epoch, 'controls') or '0') then
  return {'older'}
end
for i = EACH.first, #ARGV, EACH.step do
  local kind, name, value = ARGV[i + EACH.kind], ARGV[i + EACH.name], ARGV[i + EACH.value]
  local key = control_key(kind)
  if value == '' then
    redis.call('HDEL', key, name)
  else
    redis.call('HSET', key, name, value)
  end
  local book = kind == 'cordon' and read_book(name, epoch)
  if book then
    enter_cordon(book, value ~= '' and value or nil)
  end
  if kind == 'cordon' then
    -- The worker listens (workers/membership/epoch_watch.py).
    redis.call('PUBLISH', KEY.cordons, name)
  end
end
mark_controls()
if last == '1' then
  redis.call('HSET', KEY.epoch, 'controls', version)
end
return {'ok'}
