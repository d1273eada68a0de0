-- Transitions of a job: the note for Postgres, and the job as the ledger has it.

-- Note a transition for Postgres. The new entry replaces an entry of the same attempt that Postgres does not have yet,
-- because it says all that the old one said. A change in the backlog belongs to the job's next attempt, so the entry
-- that ended an attempt is never replaced by one of the next attempt. `job` is that of read_job; the caller writes it
-- back.
local function note(id, job, state, step, now, more)
  local span = job.attempt
  if step == STEP.filed or step == STEP.dropped then
    span = int(tonumber(job.attempt) + 1)
  end
  if job.entry and job.noted == span then
    redis.call('XDEL', KEY.stream, job.entry)
  end
  job.entry = redis.call('XADD', KEY.stream, '*', 'job', id, 'epoch', job.epoch, 'attempt', job.attempt,
    'state', state, 'step', step, 'worker', job.worker or '', 'incarnation', job.incarnation or '',
    'admitted', job.admitted or '', 'started', job.started or '', 'at', int(now), 'losses', job.losses or '0',
    'outcome', more and more.outcome or '', 'error', more and more.error or '', 'outbox', more and more.outbox or '',
    'told', more and more.told or '')
  job.noted = span
  -- Watchers of the job listen on the channel that has the name of its key (routing/inspect/job_events.py).
  redis.call('PUBLISH', KEY.job .. id, job.epoch .. ' ' .. job.attempt .. ' ' .. step .. ' ' .. state .. ' ' ..
    int(now) .. ' ' .. (job.worker or ''))
  return job.entry
end

-- A job as the ledger has it, without its message, or nil.
local function read_job(id)
  local v = redis.call('HMGET', KEY.job .. id, 'state', 'epoch', 'attempt', 'worker', 'incarnation', 'shape', 'order',
    'admitted', 'started', 'nonce', 'losses', 'entry', 'noted', 'final', 'successor', 'submitted', 'rerun', 'revoked')
  if not v[1] then
    return nil
  end
  return {state = v[1], epoch = v[2], attempt = v[3], worker = v[4] or nil, incarnation = v[5] or nil,
    shape = v[6] or nil, order = v[7] or nil, admitted = v[8] or nil, started = v[9] or nil, nonce = v[10] or nil,
    losses = v[11] or nil, entry = v[12] or nil, noted = v[13] or nil, final = v[14] or nil,
    successor = v[15] or nil, submitted = v[16] or nil, rerun = v[17] or nil, revoked = v[18] or nil}
end

-- The token "<epoch>.<attempt>": a larger one is newer.
local function token_of(job)
  return job.epoch .. '.' .. job.attempt
end

-- A job's message with the token of its attempt as delivery tag. The message ends with the closing braces of its
-- properties and of itself, so the tag goes before them.
local function tagged(message, id, job)
  return string.sub(message, 1, -3) .. ',"delivery_tag":' .. cjson.encode(id .. ':' .. token_of(job)) .. '}}'
end
