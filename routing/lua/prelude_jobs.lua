-- Shared by the scripts of the ledger, as prelude.lua is. Here: what becomes of jobs, from the note for Postgres to the
-- pass that fills a worker.

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
    'outcome', more and more.outcome or '', 'error', more and more.error or '')
  job.noted = span
  return job.entry
end

-- What the ledger knows of a job (without its message), or nil.
local function read_job(id)
  local v = redis.call('HMGET', KEY.job .. id, 'state', 'epoch', 'attempt', 'worker', 'incarnation', 'shape', 'order',
    'admitted', 'started', 'nonce', 'losses', 'entry', 'noted', 'final', 'successor', 'submitted')
  if not v[1] then
    return nil
  end
  return {state = v[1], epoch = v[2], attempt = v[3], worker = v[4] or nil, incarnation = v[5] or nil,
    shape = v[6] or nil, order = v[7] or nil, admitted = v[8] or nil, started = v[9] or nil, nonce = v[10] or nil,
    losses = v[11] or nil, entry = v[12] or nil, noted = v[13] or nil, final = v[14] or nil,
    successor = v[15] or nil, submitted = v[16] or nil}
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

-- File a job under its shape. The job's own hash is the caller's.
local function file(id, shape, order)
  redis.call('ZADD', KEY.wait .. shape, order, id)
  local head = redis.call('ZSCORE', KEY.shapes, shape)
  if not head or tonumber(order) < tonumber(head) then
    redis.call('ZADD', KEY.shapes, order, shape)
  end
end

-- After something left the queue of a shape: its place among the shapes is that of its new first job.
-- Returns that job's order, or nil when nothing waits any more.
local function refile(shape)
  local head = redis.call('ZRANGE', KEY.wait .. shape, 0, 0, 'WITHSCORES')
  if not head[1] then
    redis.call('ZREM', KEY.shapes, shape)
    return nil
  end
  redis.call('ZADD', KEY.shapes, head[2], shape)
  return tonumber(head[2])
end

-- What a worker holds: the sum of the amounts, and those entries of its list that no job's own key speaks of.
local function sum_held(worker)
  local sums, strays = {}, {}
  local held = redis.call('HGETALL', KEY.held .. worker)
  for i = 1, #held, 2 do
    local job = read_job(held[i])
    if job and job.worker == worker and token_of(job) == held[i + 1] and (job.state == 'admitted' or job.state == 'running') then
      for name, amount in pairs(amounts_of(job.shape)) do
        sums[name] = (sums[name] or 0) + amount
      end
    else
      strays[#strays + 1] = held[i]
    end
  end
  return sums, strays
end

-- Admit a job to a worker and deliver its message, in this atomic step. The caller has checked that it fits, and
-- writes the book. `job` has epoch, attempt (the new one), shape, order, losses, submitted, entry.
local function grant(id, job, message, book, now)
  job.state, job.worker, job.incarnation = 'admitted', book.worker, book.incarnation
  job.admitted, job.started = int(now), nil
  note(id, job, 'admitted', STEP.admitted, now)
  redis.call('HSET', KEY.job .. id, 'state', 'admitted', 'epoch', job.epoch, 'attempt', job.attempt,
    'worker', book.worker, 'incarnation', book.incarnation, 'shape', job.shape, 'order', job.order,
    'admitted', job.admitted, 'losses', job.losses or '0', 'submitted', job.submitted or '0',
    'entry', job.entry, 'noted', job.noted, 'message', message)
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
  out[n + 5], out[n + 6], out[n + 7], out[n + 8] = job.entry, job.losses or '0', job.shape, tagged(message, id, job)
end

-- Put a job that held an allocation back into the backlog (the caller gives the allocation back), or end it where it
-- was lost too often. Returns the state it has now.
local function put_back(id, job, now, outcome, error_text, most_losses)
  redis.call('HDEL', KEY.held .. job.worker, id)
  redis.call('ZREM', KEY.unclaimed, id)
  if outcome == 'lost' then
    job.losses = int(tonumber(job.losses or '0') + 1)
    count('lost', 1)
    -- A successor that the attempt published before it was lost runs all the same.
    if tonumber(job.losses) >= tonumber(most_losses) and not job.successor then
      note(id, job, 'lost', STEP.ended, now, {outcome = 'lost', error = error_text})
      redis.call('DEL', KEY.job .. id)
      redis.call('HSET', KEY.job .. id, 'state', 'ended', 'epoch', job.epoch, 'attempt', job.attempt, 'final', '1',
        'outcome', 'lost', 'became', 'lost')
      redis.call('PEXPIRE', KEY.job .. id, LIMIT.tombstone)
      return 'lost'
    end
  end
  local kept = redis.call('HEXISTS', KEY.job .. id, 'message') == 1
  if job.successor or not kept then
    -- Postgres has what runs next: the successor that the attempt published, or the message of an adopted job.
    local state = job.successor and 'scheduled' or 'accepted'
    note(id, job, state, STEP.back, now, {outcome = outcome, error = error_text})
    redis.call('DEL', KEY.job .. id)
    redis.call('HSET', KEY.job .. id, 'state', 'ended', 'epoch', job.epoch, 'attempt', job.attempt,
      'outcome', outcome, 'became', state)
    redis.call('PEXPIRE', KEY.job .. id, LIMIT.tombstone)
    return state
  end
  note(id, job, 'waiting', STEP.back, now, {outcome = outcome, error = error_text})
  redis.call('HDEL', KEY.job .. id, 'worker', 'incarnation', 'admitted', 'started', 'nonce', 'redelivered')
  redis.call('HSET', KEY.job .. id, 'state', 'waiting', 'losses', job.losses or '0',
    'entry', job.entry, 'noted', job.noted)
  file(id, job.shape, job.order)
  return 'waiting'
end

-- Admit to one worker what now fits on it, in order, looking at LIMIT.shapes shapes (those after the cursor `after`)
-- and admitting LIMIT.most jobs at the most. Returns the number admitted and the cursor to go on with, '' when done.
-- With a nonce the worker itself is asking: what is not large is handed over in `out`, without the way by the broker.
local function fill(worker, epoch, now, after, nonce, out)
  if not redis.call('ZSCORE', KEY.free, worker) then
    return 0, ''
  end
  local book = read_book(worker, epoch)
  if not book or book.lease <= now or room(book, 'slots') < 1 then
    return 0, ''
  end
  local found = redis.call('ZRANGEBYSCORE', KEY.shapes, after == '' and '-inf' or '(' .. after, '+inf', 'WITHSCORES',
    'LIMIT', 0, LIMIT.shapes)
  local cursor = ''
  if #found == 2 * LIMIT.shapes then
    cursor = found[#found]
  end
  -- Candidates in order of their first jobs; a shape that does not fit now cannot fit later in this pass.
  local candidates = {}
  for i = 1, #found, 2 do
    local amounts = amounts_of(found[i])
    if fits(book, amounts) then
      candidates[#candidates + 1] = {shape = found[i], order = tonumber(found[i + 1]), amounts = amounts}
    end
  end
  local admitted, changed = 0, {}
  while #candidates > 0 do
    local first = table.remove(candidates, 1)
    if fits(book, first.amounts) then
      if admitted == LIMIT.most then
        cursor = after == '' and '-inf' or after
        break
      end
      local id = redis.call('ZPOPMIN', KEY.wait .. first.shape)[1]
      local job = id and read_job(id)
      local message = job and redis.call('HGET', KEY.job .. id, 'message')
      if message then
        job.epoch, job.attempt = epoch, int(tonumber(job.attempt) + 1)
        if nonce and #message <= LIMIT.hand_over then
          hand_over(id, job, message, book, now, nonce, out)
        else
          grant(id, job, message, book, now)
        end
        admitted = admitted + 1
        for name, amount in pairs(first.amounts) do
          changed[name] = (changed[name] or 0) + amount
          -- write_book adds the differences once more: take them as lent meanwhile.
          book.capacity[name] = (book.capacity[name] or 0) - amount
        end
      elseif id then
        count('drift', 1)
      end
      local order = refile(first.shape)
      if order then
        first.order = order
        local place = #candidates + 1
        for i, other in ipairs(candidates) do
          if order < other.order then
            place = i
            break
          end
        end
        table.insert(candidates, place, first)
      end
    end
  end
  if admitted > 0 then
    for name, amount in pairs(changed) do
      book.capacity[name] = book.capacity[name] + amount
    end
    write_book(book, changed)
    count('admitted', admitted)
  end
  return admitted, cursor
end
