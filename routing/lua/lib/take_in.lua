-- Entry of a job whose row is durable: it is admitted, or filed in the backlog.

-- True if a submission came too late: past its deadline, or with a row that was read before the epoch was opened. Such
-- a row may no longer be true, and no tombstone says so. Where `opened` lies in the future, the clock was set back
-- since, and only the deadline counts.
local function is_late(deadline, now)
  local opened = tonumber(redis.call('HGET', KEY.epoch, 'opened') or '0')
  if now > deadline or (opened <= now and deadline - LIMIT.submit_limit < opened) then
    count('refused.late', 1)
    return true
  end
  return false
end

-- Bring in a job whose row is durable: admit it to the best worker and deliver it, or file it in the backlog. A job
-- that is known, or has a tombstone, is left as it is. So is a job whose transition of an older epoch is still in the
-- stream. `job` has epoch, attempt (admissions so far), shape, order, losses, submitted. Returns the reply of
-- submit.lua, and the run of the job. The caller passes the run on with the next job, or ends it.
local function take_in(id, job, message, digest, rerun, now, run)
  local stored = redis.call('HMGET', KEY.job .. id, 'state', 'final', 'attempt', 'outcome', 'became', 'entry')
  local attempt = tonumber(job.attempt)
  -- A job that its last attempt ended may still go on, with a successor of which only Postgres was told. Then its row
  -- has that attempt. A revoked or expired job does not go on, and an earlier submission has an older attempt. Until
  -- Postgres has the end of that attempt, no row says what the job is now, whoever read it.
  local went_on = stored[4] and stored[5] ~= 'cancelled' and stored[5] ~= 'expired' and tonumber(stored[3]) == attempt
  if stored[1]
      and (stored[1] ~= 'ended' or stored[6] or (stored[2] and not went_on) or tonumber(stored[3]) > attempt) then
    return {'exists', stored[1]}, run
  end
  if stored[1] then
    redis.call('DEL', KEY.job .. id)
  elseif redis.call('SISMEMBER', KEY.carried, id) == 1 then
    return {'exists', 'carried'}, run
  end
  -- Fields that never change are written once, with all the others.
  job.first = {'digest', digest}
  if rerun == '0' then
    job.first[3], job.first[4] = 'rerun', rerun
  end
  if not run or run.shape ~= job.shape or #(run.messages or run.waiting) == LIMIT.run then
    if run then
      end_run(run)
    end
    -- Where a shape already waits, another job of it would find no room either: it is filed without a search.
    run = {shape = job.shape, amounts = amounts_of(job.shape), full = redis.call('ZSCORE', KEY.shapes, job.shape),
      looked = run and run.looked or 0}
  end
  local cursor_score, cursor_worker = '', ''
  if not run.full then
    local book = run.book
    -- Use the worker of the last job as long as it has room for one more.
    if not book or run.amounts.alone or room(book, 'slots') < 1 or not fits(book, run.amounts) then
      end_run(run)
      run.book, cursor_score, cursor_worker = search(run, job.epoch, now)
      run.full = not run.book
    end
  end
  if not run.full then
    job.attempt = int(attempt + 1)
    note_admission(id, job, message, run.book, now)
    local token, due, tag = token_of(job), int(now + LIMIT.start), tagged(message, id, job)
    if run.messages then
      local n = #run.messages
      run.tokens[2 * n + 1], run.tokens[2 * n + 2] = id, token
      run.due[2 * n + 1], run.due[2 * n + 2] = due, id
      run.messages[n + 1] = tag
    else
      run.tokens, run.due, run.messages = {id, token}, {due, id}, {tag}
    end
    allocate(run.book, run.amounts, 1)
    return {'admitted', run.book.worker, job.attempt}, run
  end
  note(id, job, 'waiting', STEP.filed, now)
  redis.call('HSET', KEY.job .. id, 'state', 'waiting', 'epoch', job.epoch, 'attempt', job.attempt, 'shape', job.shape,
    'order', job.order, 'losses', job.losses, 'submitted', job.submitted, 'message', message, 'entry', job.entry,
    'noted', job.noted, unpack(job.first))
  if not run.waiting then
    run.waiting, run.first = {job.order, id}, job.order
    return {'waiting', cursor_score, cursor_worker}, run
  end
  local n = #run.waiting
  run.waiting[n + 1], run.waiting[n + 2] = job.order, id
  if tonumber(job.order) < tonumber(run.first) then
    run.first = job.order
  end
  return {'waiting', cursor_score, cursor_worker}, run
end
