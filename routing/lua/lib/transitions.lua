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
-- back. `more`: fields that most entries lack. Fields without a value are left out: each costs as much as a command.
local function note(id, job, state, step, now, more)
  local span = job.attempt
  if step == STEP.filed or step == STEP.dropped then
    span = int(tonumber(job.attempt) + 1)
  end
  if job.entry and job.noted == span then
    redis.call('XDEL', KEY.stream, job.entry)
  end
  local rest, n = {}, 0
  if job.worker then
    rest[1], rest[2], rest[3], rest[4], n = 'worker', job.worker, 'incarnation', job.incarnation or '', 4
  end
  for _, name in ipairs({'admitted', 'started'}) do
    if job[name] then
      rest[n + 1], rest[n + 2], n = name, job[name], n + 2
    end
  end
  if job.losses and job.losses ~= '0' then
    rest[n + 1], rest[n + 2], n = 'losses', job.losses, n + 2
  end
  if number_held(job.shape or '') then
    rest[n + 1], rest[n + 2], n = 'shape', job.shape, n + 2
  end
  for name, value in pairs(more or {}) do
    if value ~= '' then
      rest[n + 1], rest[n + 2], n = name, value, n + 2
    end
  end
  job.entry = redis.call('XADD', KEY.stream, '*', 'job', id, 'epoch', job.epoch, 'attempt', job.attempt,
    'state', state, 'step', step, 'at', int(now), unpack(rest))
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

-- A job's message with the token of its attempt as delivery tag, and with the number of the alternative that it holds
-- behind a slash. The message ends with the closing braces of its
-- properties and of itself, so the tag goes before them.
local function tagged(message, id, job)
  local number = number_held(job.shape)
  return string.sub(message, 1, -3) .. ',"delivery_tag":' ..
    cjson.encode(id .. ':' .. token_of(job) .. (number and '/' .. number or '')) .. '}}'
end
