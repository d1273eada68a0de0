#!lua flags=allow-oom
-- Does: ends a waiting job, which was revoked, is past its expiry, or fits no registered worker.
-- KEYS: none; by name: epoch, job, carried, wait, shapes, shapes_of, asks, counters, stream, kept, book, free, free_of,
--   view, allocated, allocated_cpus, border, low, tenant_heads
-- ARGV: epoch, run_id, id (of the job), state (cancelled, expired or failed), error_text
-- Replies: {ended, entry, freed (a worker that was kept for this job, and is to be filled; '': none)}
--   | {held, state, worker} | {over} | {missing} | {unsure} (the books are being rebuilt, so a worker may hold the job)
--   | {cold} | {epoch, current}
-- Cost: constant, and a command for each index of free CPUs in which a kept worker stands
-- Repeat: harmless: answered 'over' while the tombstone stands
local job = read_job(id)
if job and job.state == 'ended' and job.final then
  return {'over'}
end
if not job and redis.call('SISMEMBER', KEY.carried, id) == 1 then
  -- The stream has the job's transition of an older epoch, so its row has it soon.
  return {'over'}
end
if not job or job.state == 'ended' then
  if redis.call('HEXISTS', KEY.epoch, 'rebuilding') == 1 then
    -- A worker may hold the job without having said so yet, and nothing here may stand in its way.
    return {'unsure'}
  end
  -- The job may be on its way here: the submit then finds that it has ended. Postgres decides.
  local tombstone = job or {attempt = '0'}
  tombstone.state, tombstone.epoch, tombstone.final, tombstone.became = 'ended', epoch, '1', state
  write_job(id, tombstone, not tombstone.entry and LIMIT.tombstone or nil)
  return {'missing'}
end
if job.state ~= 'waiting' then
  return {'held', job.state, job.worker}
end
local now = clock()
unqueue(job.shape, id)
job.epoch = epoch
-- The attempt before, if there was one, has its own entry. This entry is about the job.
local entry = note(id, job, state, STEP.dropped, now, {error = error_text})
bury(id, job, state, nil, true)
count(state, 1)
return {'ended', entry, leave_queue(job.shape, epoch, facts)}
