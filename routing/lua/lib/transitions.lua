-- The note of a job's transitions for Postgres, and the token and the message of an attempt.

-- Drop the entry of a job, because Postgres has it. From then on the tombstone of an ended job has an expiry. A process
-- that opens the ledger anew also drops entries of jobs in an older format, which it removes.
local function drop_entry(id, entry)
  local value = redis.pcall('GETRANGE', KEY.job .. id, 0, LIMIT.head - 1)
  local state, current, rest = string.match(type(value) == 'string' and value or '', '^(%l+)\n([^\n]*)\n[^\n]*()')
  if current ~= entry then
    return
  end
  if state == 'ended' then
    redis.call('SET', KEY.job .. id, 'ended\n\n' .. string.sub(value, rest), 'PX', LIMIT.tombstone)
  else
    local job = read_job(id)
    if job then
      job.entry, job.noted = nil, nil
      write_job(id, job)
    end
  end
end

-- Note a transition for Postgres. The new entry replaces an entry of the same attempt that Postgres does not have yet,
-- because it says all that the old one said. A change in the backlog belongs to the job's next attempt, so the entry
-- that ended an attempt is never replaced by one of the next attempt. `job` is that of read_job; the caller writes it
-- back. `more`: fields that most entries lack; those without a value are left out.
local function note(id, job, state, step, now, more)
  local span = job.attempt
  if step == STEP.filed or step == STEP.dropped then
    span = int(tonumber(job.attempt) + 1)
  end
  if job.entry and job.noted == span then
    redis.call('XDEL', KEY.stream, job.entry)
  end
  local rest = {}
  for name, value in pairs(more or rest) do
    if value ~= '' then
      rest[#rest + 1], rest[#rest + 2] = name, value
    end
  end
  job.entry = redis.call('XADD', KEY.stream, '*', 'job', id, 'epoch', job.epoch, 'attempt', job.attempt,
    'state', state, 'step', step, 'worker', job.worker or '', 'incarnation', job.incarnation or '',
    'admitted', job.admitted or '', 'started', job.started or '', 'at', int(now), 'losses', job.losses or '0',
    unpack(rest))
  job.noted = span
  -- Watchers of the job listen on the channel that has the name of its key (routing/inspect/job_events.py).
  redis.call('PUBLISH', KEY.job .. id, job.epoch .. ' ' .. job.attempt .. ' ' .. step .. ' ' .. state .. ' ' ..
    int(now) .. ' ' .. (job.worker or ''))
  return job.entry
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
