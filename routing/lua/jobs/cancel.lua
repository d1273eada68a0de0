#!lua flags=allow-oom
-- Does: ends a waiting job, which was revoked or is past its expiry.
-- KEYS: none; by name: epoch, job, carried, wait, shapes, shapes_of, counters, stream, held, unclaimed, kept, book,
--   free, free_of, view, allocated, allocated_cpus, tasks
-- ARGV: epoch, run_id, job, state (cancelled or expired), error
-- Replies: {ended, entry} | {held, state, worker} | {over} | {missing} | {unsure} (the books are being rebuilt, so a
--   worker may hold the job) | {cold} | {epoch, current}
-- Cost: constant, but LIMIT.freed passes like that of fill where a worker was kept for this job
-- Repeat: harmless: answered 'over' while the tombstone stands
local epoch, run_id, id, state, error_text = ARG.epoch, ARG.run_id, ARG.job, ARG.state, ARG.error

local no = refused(epoch, run_id)
if no then
  return no
end
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
  redis.call('HSET', KEY.job .. id, 'state', 'ended', 'epoch', epoch, 'attempt', job and job.attempt or '0',
    'final', '1', 'became', state)
  if not (job and job.entry) then
    redis.call('PEXPIRE', KEY.job .. id, LIMIT.tombstone)
  end
  return {'missing'}
end
if job.state ~= 'waiting' then
  return {'held', job.state, job.worker}
end
local now = clock()
redis.call('ZREM', KEY.wait .. job.shape, id)
job.epoch = epoch
-- The attempt before, if there was one, has its own entry. This entry is about the job.
local entry = note(id, job, state, STEP.dropped, now, {error = error_text})
bury(id, job, state, nil, true)
count(state, 1)
local freed = leave_queue(job.shape, epoch)
if freed then
  fill_freed(freed, epoch, now)
end
return {'ended', entry}
