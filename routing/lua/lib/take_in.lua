-- A job whose row is durable comes in: admitted, or filed in the backlog.

-- Whether a submission came too late: past its deadline, or with a row that was read before the epoch was opened. What the
-- row said may not be true any more, and no tombstone says so. (A time that is still to come is that of a clock which was
-- set back since.)
local function is_late(deadline, now)
  local opened = tonumber(redis.call('HGET', KEY.epoch, 'opened') or '0')
  if now > deadline or (opened <= now and deadline - LIMIT.submit_within < opened) then
    count('refused.late', 1)
    return true
  end
  return false
end

-- Bring in a job whose row is durable: admit it to the best worker and deliver it, or file it in the backlog. One that is
-- known (or has ended, by its tombstone) is left as it is, and so is one of which the stream still has what became of it in
-- an older epoch. `job` has epoch, attempt (admissions so far), shape, order, losses, submitted. Returns what became of it,
-- as submit.lua replies, and the run that it is of, which the caller gives on with the next job, or ends.
local function take_in(id, job, message, digest, rerun, now, run)
  local known = redis.call('HMGET', KEY.job .. id, 'state', 'final', 'attempt', 'outcome', 'became', 'entry')
  local attempt = tonumber(job.attempt)
  -- What its last attempt ended may go on all the same, with a successor of which only Postgres was told: then its row
  -- has that attempt. (One that was revoked or expired does not; and what was submitted before has an older attempt.)
  -- While Postgres does not have how that attempt ended, no row says what the job is now, whoever read it.
  local went_on = known[4] and known[5] ~= 'cancelled' and known[5] ~= 'expired' and tonumber(known[3]) == attempt
  if known[1] and (known[1] ~= 'ended' or known[6] or (known[2] and not went_on) or tonumber(known[3]) > attempt) then
    return {'exists', known[1]}, run
  end
  if known[1] then
    redis.call('DEL', KEY.job .. id)
  elseif redis.call('SISMEMBER', KEY.carried, id) == 1 then
    return {'exists', 'carried'}, run
  end
  -- What never changes is written once, with all the rest.
  job.first = {'digest', digest}
  if rerun == '0' then
    job.first[3], job.first[4] = 'rerun', rerun
  end
  if not run or run.shape ~= job.shape or #(run.messages or run.waiting) == LIMIT.run then
    if run then
      end_run(run)
    end
    -- A job whose shape already waits would find no room either: it is filed unseen.
    run = {shape = job.shape, amounts = amounts_of(job.shape), full = redis.call('ZSCORE', KEY.shapes, job.shape),
      looked = run and run.looked or 0}
  end
  local cursor_score, cursor_worker = '', ''
  if not run.full then
    local book = run.book
    -- Is there room for one more where the last one went?
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
