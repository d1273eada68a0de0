-- Entry of a job whose row is durable: it is admitted, or filed in the backlog.

-- True if a submission came too late: past its deadline, or with a row that was read before the epoch was opened. Such
-- a row may no longer be true, and no tombstone says so. Where `opened` lies in the future, the clock was set back
-- since, and only the deadline counts.
local function is_late(deadline, now, facts)
  local opened = tonumber(facts.opened or '0')
  if now > deadline or (opened <= now and deadline - LIMIT.submit_limit < opened) then
    count('refused.late', 1)
    return true
  end
  return false
end

-- Bring in a job whose row is durable: admit it to the best worker and deliver it, or file it in the backlog. Beyond
-- the head of the backlog it stays in Postgres, unless it was `fetched` from there. A job
-- that is known, or has a tombstone, is left as it is. So is a job whose transition of an older epoch is still in the
-- stream. `job` has epoch, attempt (admissions so far), shape, order, losses, submitted, message, digest. Returns
-- the reply of submit.lua, and the batch of the job. The caller passes the batch on with the next job, or writes it.
local function admit_or_file(id, job, rerun, facts, now, batch)
  local stored, attempt = read_job(id), tonumber(job.attempt)
  if stored then
    -- A job that its last attempt ended may still go on, with a successor of which only Postgres was told. Then its row
    -- has that attempt. A revoked or expired job does not go on, and an earlier submission has an older attempt. Until
    -- Postgres has the end of that attempt, no row says what the job is now, whoever read it.
    local last, became = tonumber(stored.attempt), stored.became
    local went_on = stored.outcome and became ~= 'cancelled' and became ~= 'expired' and last == attempt
    if stored.state ~= 'ended' or stored.entry or (stored.final and not went_on) or last > attempt then
      return {'exists', stored.state}, batch
    end
  elseif facts.carries and redis.call('SISMEMBER', KEY.carried, id) == 1 then
    return {'exists', 'carried'}, batch
  end
  -- A field that is set to nil takes up a place too, for which Lua may have to enlarge the table.
  if rerun == '0' then
    job.rerun = rerun
  end
  if not batch or batch.shape ~= job.shape or #(batch.messages or batch.waiting or '') == LIMIT.batch then
    if batch then
      write_batch(batch)
    end
    -- Where a shape already waits, another job of it would find no room either: it is filed without a search.
    local paused = is_paused(facts.paused, job.shape)
    batch = {shape = job.shape, options = options_of(job.shape), paused = paused, looked = batch and batch.looked or 0,
      full = paused or redis.call('ZSCORE', KEY.shapes, job.shape)}
    -- A batch is filed from the job on that would exceed the quota of its tenant.
    if has_tenants(facts, job.shape) then
      batch.rule, batch.used = quota_of(facts, job.shape)
    end
    batch.border = facts.stay and redis.call('ZSCORE', KEY.border, job.shape)
  end
  if batch.border and not facts.fetched and tonumber(job.order) >= tonumber(batch.border) then
    leave_behind(id, batch, job.order, facts)
    return {'left'}, batch
  end
  local cursor_score, cursor_worker, passing = '', '', ''
  -- A reserved worker may take a job that comes before all others of its shape.
  local first = not batch.full or (not batch.paused and tonumber(job.order) < tonumber(batch.full))
  local options = allowed_options(batch.rule, batch.used, batch.options)
  if not batch.full and not has_option(options) then
    batch.full, first = job.order, false
  end
  if not batch.full then
    local book = batch.book
    -- Use the worker of the last job as long as it has room for one more.
    local other = not book or #options > 1 or options[1].alone or is_spread(job.shape)
    if other or room(book, 'slots') < 1 or not fits(book, batch.amounts) then
      write_batch(batch)
      batch.book, cursor_score, cursor_worker = find_worker(batch, options, job.epoch, now)
      batch.full = not batch.book and job.order
    end
  end
  if not batch.full then
    job.attempt, job.shape = int(attempt + 1), holding(job.shape, batch.number)
    if facts.tenants then
      job.counted = '1'
    end
    note_admission(id, job, batch.book, now)
    local token, due, tag = token_of(job), int(now + LIMIT.start), tagged(job.message, id, job)
    if batch.messages then
      local n = #batch.messages
      batch.tokens[2 * n + 1], batch.tokens[2 * n + 2] = id, token
      batch.due[2 * n + 1], batch.due[2 * n + 2] = due, id
      batch.messages[n + 1] = tag
    else
      batch.tokens, batch.due, batch.messages = {id, token}, {due, id}, {tag}
    end
    allocate(batch.book, batch.amounts, 1)
    for name in pairs(batch.used or {}) do
      batch.used[name] = batch.used[name] + (batch.amounts[name] or 0)
    end
    return {'admitted', batch.book.worker, job.attempt}, batch
  end
  if not facts.fetched and is_beyond(batch, facts) then
    leave_behind(id, batch, job.order, facts)
    return {'left'}, batch
  end
  if facts.reserved and first and not facts.fetched then
    passing = passing_worker(facts, job.shape, job.order, options, job.epoch, now)
  elseif facts.asks and first and not facts.fetched then
    redis.call('PUBLISH', KEY.low, 'reserve')
  end
  facts.waiting, batch.here = facts.waiting + 1, batch.here and batch.here + 1
  job.state = 'waiting'
  note(id, job, 'waiting', STEP.filed, now)
  write_job(id, job)
  if not batch.waiting then
    batch.waiting, batch.first = {job.order, id}, job.order
    return {'waiting', cursor_score, cursor_worker, passing}, batch
  end
  local n = #batch.waiting
  batch.waiting[n + 1], batch.waiting[n + 2] = job.order, id
  if tonumber(job.order) < tonumber(batch.first) then
    batch.first = job.order
  end
  return {'waiting', cursor_score, cursor_worker, passing}, batch
end
