-- Shared by the scripts of the ledger, as prelude.lua is. Here: what becomes of jobs, from the note for Postgres to the
-- way back into the backlog.

-- Note a transition for Postgres. An entry of the same attempt that Postgres does not have yet is replaced: the new
-- one says all that the old one said. What happens to a job in the backlog belongs to its next attempt; what ended an
-- attempt is never replaced by the next one. `job` is what read_job gave; the caller writes it back.
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
    'outcome', more and more.outcome or '', 'error', more and more.error or '', 'outbox', more and more.outbox or '')
  job.noted = span
  -- Whoever watches the job hears of it on the channel that has the name of its key (routing/inspect/job_events.py).
  redis.call('PUBLISH', KEY.job .. id, job.epoch .. ' ' .. job.attempt .. ' ' .. step .. ' ' .. state .. ' ' .. int(now) ..
    ' ' .. (job.worker or ''))
  return job.entry
end

-- What the ledger knows of a job (without its message), or nil.
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

-- "<epoch>.<attempt>": larger is newer.
local function token_of(job)
  return job.epoch .. '.' .. job.attempt
end

-- A job's message with the token of its attempt as delivery tag. The message ends with the closing braces of its
-- properties and of itself: the tag goes before them.
local function tagged(message, id, job)
  return string.sub(message, 1, -3) .. ',"delivery_tag":' .. cjson.encode(id .. ':' .. token_of(job)) .. '}}'
end

-- The index of waiting shapes in which one stands beside the whole one: that of its queue; in the default queue that of
-- the first resource it asks for which not every worker has.
local function shapes_beside(shape)
  local label = label_of(shape)
  if label then
    return KEY.shapes_of .. label
  end
  for name in string.gmatch(shape, '([^=,]+)=') do
    if has_index(name) then
      return KEY.shapes_of .. name
    end
  end
  return KEY.shapes_of .. LIMIT.unlabelled
end

-- File jobs under their shape: order, id, order, id, ... of which `first` is the least. Their own hashes are the caller's.
local function file(shape, jobs, first)
  redis.call('ZADD', KEY.wait .. shape, unpack(jobs))
  local head = redis.call('ZSCORE', KEY.shapes, shape)
  if not head or tonumber(first) < tonumber(head) then
    redis.call('ZADD', KEY.shapes, first, shape)
    redis.call('ZADD', shapes_beside(shape), first, shape)
  end
end

-- After something left the queue of a shape: its place among the shapes is that of its new first job.
-- Returns that job's order, or nil when nothing waits any more.
local function refile(shape)
  local head = redis.call('ZRANGE', KEY.wait .. shape, 0, 0, 'WITHSCORES')
  if not head[1] then
    redis.call('ZREM', KEY.shapes, shape)
    redis.call('ZREM', shapes_beside(shape), shape)
    return nil
  end
  redis.call('ZADD', KEY.shapes, head[2], shape)
  redis.call('ZADD', shapes_beside(shape), head[2], shape)
  return tonumber(head[2])
end

-- The shape under which the next attempt of a job is filed: alone, where one more loss ends it (`held_by` of
-- routing/policy/placement.py). Names stand in the order of their bytes.
local function shape_held(shape, losses, most_losses)
  local most = tonumber(most_losses)
  if most <= 1 or tonumber(losses) < most - 1 or amounts_of(shape).alone then
    return shape
  end
  local parts, own = {}, 'alone'
  for name, amount in string.gmatch(shape, '([^=,]+)=(%d+)') do
    if own then
      local at = 1
      while at <= #name and string.byte(name, at) == string.byte(own, at) do
        at = at + 1
      end
      if (string.byte(name, at) or 0) > (string.byte(own, at) or 0) then
        parts[#parts + 1], own = 'alone=1', nil
      end
    end
    parts[#parts + 1] = name .. '=' .. amount
  end
  if own then
    parts[#parts + 1] = 'alone=1'
  end
  return table.concat(parts, ',')
end

-- Write down that a job is admitted to a worker. `job` has epoch, attempt (the new one), shape, order, losses, submitted,
-- entry, and of a new job the fields that are written once (`first`).
local function note_admission(id, job, message, book, now)
  job.state, job.worker, job.incarnation = 'admitted', book.worker, book.incarnation
  job.admitted, job.started = int(now), nil
  note(id, job, 'admitted', STEP.admitted, now)
  redis.call('HSET', KEY.job .. id, 'state', 'admitted', 'epoch', job.epoch, 'attempt', job.attempt,
    'worker', book.worker, 'incarnation', book.incarnation, 'shape', job.shape, 'order', job.order,
    'admitted', job.admitted, 'losses', job.losses or '0', 'submitted', job.submitted or '0',
    'entry', job.entry, 'noted', job.noted, 'message', message, unpack(job.first or {}))
end

-- Admit a job to a worker and deliver its message, in this atomic step. The caller has checked that it fits, and
-- writes the book.
local function grant(id, job, message, book, now)
  note_admission(id, job, message, book, now)
  redis.call('HSET', KEY.held .. book.worker, id, token_of(job))
  redis.call('ZADD', KEY.unclaimed, int(now + LIMIT.start), id)
  redis.call('LPUSH', book.queue, tagged(message, id, job))
end

-- Admit a job to the worker that is asking, and give it the lease at once: its message goes into the reply (`out`), so
-- that it comes neither through the broker nor back with a claim. Where the reply is lost, `recover` gives it again.
local function hand_over(id, job, message, book, now, nonce, out)
  job.state, job.worker, job.incarnation = 'running', book.worker, book.incarnation
  job.admitted, job.started = int(now), int(now)
  note(id, job, 'running', STEP.running, now)
  redis.call('HSET', KEY.job .. id, 'state', 'running', 'epoch', job.epoch, 'attempt', job.attempt,
    'worker', book.worker, 'incarnation', book.incarnation, 'shape', job.shape, 'order', job.order,
    'admitted', job.admitted, 'started', job.started, 'nonce', nonce, 'losses', job.losses or '0',
    'entry', job.entry, 'noted', job.noted)
  redis.call('HSET', KEY.held .. book.worker, id, token_of(job))
  local n = #out
  out[n + 1], out[n + 2], out[n + 3], out[n + 4] = id, token_of(job), job.admitted, job.started
  out[n + 5], out[n + 6], out[n + 7], out[n + 8] = job.entry, job.losses or '0', job.shape, job.rerun or ''
  out[n + 9] = tagged(message, id, job)
end

-- Leave a tombstone of a job whose attempt is over, or that ended in the backlog. `job` has the entry that says so: while
-- Postgres does not have that, the tombstone stays, whatever time it takes. `forget` gives it the rest of its life.
local function bury(id, job, became, outcome, final)
  local fields = {'state', 'ended', 'epoch', job.epoch, 'attempt', job.attempt}
  for name, value in pairs({became = became, outcome = outcome, final = final and '1', entry = job.entry,
      noted = job.entry and job.noted}) do
    if value then
      fields[#fields + 1], fields[#fields + 2] = name, value
    end
  end
  redis.call('DEL', KEY.job .. id)
  redis.call('HSET', KEY.job .. id, unpack(fields))
  if not job.entry then
    redis.call('PEXPIRE', KEY.job .. id, LIMIT.tombstone)
  end
end

-- Put a job that held an allocation back into the backlog (the caller gives the allocation back), or end it where it
-- was revoked meanwhile or lost too often (then with its outbox). Returns the state it has now.
local function put_back(id, job, now, outcome, error_text, most_losses, outbox)
  redis.call('HDEL', KEY.held .. job.worker, id)
  redis.call('ZREM', KEY.unclaimed, id)
  if outcome == 'lost' then
    job.losses = int(tonumber(job.losses or '0') + 1)
    count('lost', 1)
  end
  if job.revoked then
    note(id, job, 'cancelled', STEP.back, now, {outcome = outcome, error = 'revoked'})
    bury(id, job, 'cancelled', outcome, true)
    return 'cancelled'
  end
  if outcome == 'lost' then
    -- A successor that the attempt published before it was lost runs all the same.
    if (job.rerun == '0' or tonumber(job.losses) >= tonumber(most_losses)) and not job.successor then
      note(id, job, 'lost', STEP.ended, now, {outcome = 'lost', error = error_text, outbox = outbox})
      bury(id, job, 'lost', 'lost', true)
      return 'lost'
    end
    job.shape = shape_held(job.shape, job.losses, most_losses)
  end
  local kept = redis.call('HEXISTS', KEY.job .. id, 'message') == 1
  if job.successor or not kept then
    -- Postgres has what runs next: the successor that the attempt published, or the message of an adopted job.
    local state = job.successor and 'scheduled' or 'accepted'
    note(id, job, state, STEP.back, now, {outcome = outcome, error = error_text})
    bury(id, job, state, outcome, false)
    return state
  end
  note(id, job, 'waiting', STEP.back, now, {outcome = outcome, error = error_text})
  redis.call('HDEL', KEY.job .. id, 'worker', 'incarnation', 'admitted', 'started', 'nonce', 'redelivered')
  redis.call('HSET', KEY.job .. id, 'state', 'waiting', 'shape', job.shape, 'losses', job.losses or '0',
    'entry', job.entry, 'noted', job.noted)
  file(job.shape, {job.order, id}, job.order)
  return 'waiting'
end
