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
    'outcome', more and more.outcome or '', 'error', more and more.error or '', 'outbox', more and more.outbox or '')
  job.noted = span
  -- Whoever watches the job hears of it on the channel that has the name of its key (routing/watching.py).
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

-- Nobody waits under a shape any more: the worker that was kept for it is so no longer. Returns it, to be filled.
local function unkeep(shape, epoch)
  local worker = redis.call('HGET', KEY.kept, shape)
  if not worker then
    return nil
  end
  redis.call('HDEL', KEY.kept, shape)
  if redis.call('HGET', KEY.book .. worker, 'kept') ~= shape then
    return nil
  end
  redis.call('HDEL', KEY.book .. worker, 'kept')
  local book = read_book(worker, epoch)
  if book then
    write_book(book, {})
  end
  return worker
end

-- Is another worker kept for a shape? One that cannot take it any more is kept no longer.
local function is_kept_elsewhere(shape, amounts, worker, epoch, now)
  local other = redis.call('HGET', KEY.kept, shape)
  local book = other and other ~= worker and read_book(other, epoch)
  if not book or book.kept ~= shape then
    return false
  end
  if book.status == 'ready' and book.lease > now and serves(book, shape) and fits_empty(book, amounts) then
    return true
  end
  redis.call('HDEL', KEY.book .. other, 'kept')
  book.kept = nil
  write_book(book, {})
  return false
end

-- The shape under which the next attempt of a job is filed: alone, where one more loss ends it (`held_by` of
-- routing/policy.py). Names stand in the order of their bytes.
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

-- What a worker holds: the sum of the amounts, and those entries of its list that no job's own key speaks of.
local function sum_held(worker)
  local sums, strays = {}, {}
  local held = redis.call('HGETALL', KEY.held .. worker)
  for i = 1, #held, 2 do
    local job = redis.call('HMGET', KEY.job .. held[i], 'state', 'epoch', 'attempt', 'worker', 'shape')
    if (job[1] == 'admitted' or job[1] == 'running') and job[4] == worker and job[2] .. '.' .. job[3] == held[i + 1] then
      for name, amount in pairs(amounts_of(job[5])) do
        sums[name] = (sums[name] or 0) + amount
      end
    else
      strays[#strays + 1] = held[i]
    end
  end
  return sums, strays
end

-- Admit a job to a worker and deliver its message, in this atomic step. The caller has checked that it fits, and
-- writes the book. `job` has epoch, attempt (the new one), shape, order, losses, submitted, entry, and of a new job the
-- fields that are written once (`first`).
local function grant(id, job, message, book, now)
  job.state, job.worker, job.incarnation = 'admitted', book.worker, book.incarnation
  job.admitted, job.started = int(now), nil
  note(id, job, 'admitted', STEP.admitted, now)
  redis.call('HSET', KEY.job .. id, 'state', 'admitted', 'epoch', job.epoch, 'attempt', job.attempt,
    'worker', book.worker, 'incarnation', book.incarnation, 'shape', job.shape, 'order', job.order,
    'admitted', job.admitted, 'losses', job.losses or '0', 'submitted', job.submitted or '0',
    'entry', job.entry, 'noted', job.noted, 'message', message, unpack(job.first or {}))
  redis.call('HSET', KEY.held .. book.worker, id, token_of(job))
  redis.call('ZADD', KEY.unclaimed, int(now + LIMIT.start), id)
  redis.call('LPUSH', book.queue, tagged(message, id, job))
end

-- Bring in a job whose row is durable: admit it to the best worker and deliver it, or file it in the backlog. One that is
-- known (or ended within the last 60 s, by its tombstone) is left as it is. `job` has epoch, attempt (admissions so far),
-- shape, order, losses, submitted. Returns what became of it, as submit.lua replies.
local function take_in(id, job, message, digest, rerun, now)
  local known = redis.call('HMGET', KEY.job .. id, 'state', 'final', 'attempt', 'outcome', 'became')
  local attempt = tonumber(job.attempt)
  -- What its last attempt ended may go on all the same, with a successor of which only Postgres was told: then its row
  -- has that attempt. (One that was revoked or expired does not; and what was submitted before has an older attempt.)
  local went_on = known[4] and known[5] ~= 'cancelled' and known[5] ~= 'expired' and tonumber(known[3]) == attempt
  if known[1] and (known[1] ~= 'ended' or (known[2] and not went_on) or tonumber(known[3]) > attempt) then
    return {'exists', known[1]}
  end
  if known[1] then
    redis.call('DEL', KEY.job .. id)
  end
  -- What never changes is written once, with all the rest.
  job.first = {'digest', digest}
  if rerun == '0' then
    job.first[3], job.first[4] = 'rerun', rerun
  end
  local cursor_score, cursor_worker = '', ''
  -- A job whose shape already waits would find no room either: it is filed unseen.
  if not redis.call('ZSCORE', KEY.shapes, job.shape) then
    local amounts = amounts_of(job.shape)
    local least, looked_at = int(amounts.cpus or 0), 0
    -- The first few are nearly always enough; the others are fetched only when they are needed.
    for _, size in ipairs({LIMIT.few, LIMIT.candidates - LIMIT.few}) do
      local found = redis.call('ZRANGEBYSCORE', KEY.free, least, '+inf', 'LIMIT', looked_at, size)
      local book = first_with_room(found, job.epoch, now, amounts)
      if book then
        job.attempt = int(attempt + 1)
        grant(id, job, message, book, now)
        enter(book, amounts)
        count('admitted', 1)
        return {'admitted', book.worker, job.attempt}
      end
      looked_at = looked_at + #found
      if #found < size then
        break
      end
      cursor_worker = found[#found]
    end
    if looked_at == LIMIT.candidates then
      cursor_score = redis.call('ZSCORE', KEY.free, cursor_worker)
    else
      cursor_worker = ''
    end
  end
  note(id, job, 'waiting', STEP.filed, now)
  redis.call('HSET', KEY.job .. id, 'state', 'waiting', 'epoch', job.epoch, 'attempt', job.attempt, 'shape', job.shape,
    'order', job.order, 'losses', job.losses, 'submitted', job.submitted, 'message', message, 'entry', job.entry,
    'noted', job.noted, unpack(job.first))
  file(id, job.shape, job.order)
  count('filed', 1)
  return {'waiting', cursor_score, cursor_worker}
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
    redis.call('DEL', KEY.job .. id)
    redis.call('HSET', KEY.job .. id, 'state', 'ended', 'epoch', job.epoch, 'attempt', job.attempt, 'final', '1',
      'outcome', outcome, 'became', 'cancelled')
    redis.call('PEXPIRE', KEY.job .. id, LIMIT.tombstone)
    return 'cancelled'
  end
  if outcome == 'lost' then
    -- A successor that the attempt published before it was lost runs all the same.
    if (job.rerun == '0' or tonumber(job.losses) >= tonumber(most_losses)) and not job.successor then
      note(id, job, 'lost', STEP.ended, now, {outcome = 'lost', error = error_text, outbox = outbox})
      redis.call('DEL', KEY.job .. id)
      redis.call('HSET', KEY.job .. id, 'state', 'ended', 'epoch', job.epoch, 'attempt', job.attempt, 'final', '1',
        'outcome', 'lost', 'became', 'lost')
      redis.call('PEXPIRE', KEY.job .. id, LIMIT.tombstone)
      return 'lost'
    end
    job.shape = shape_held(job.shape, job.losses, most_losses)
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
  redis.call('HSET', KEY.job .. id, 'state', 'waiting', 'shape', job.shape, 'losses', job.losses or '0',
    'entry', job.entry, 'noted', job.noted)
  file(id, job.shape, job.order)
  return 'waiting'
end

-- One pass of `fill` over one worker. Returns also a worker that was kept until now for a job that went to this one.
local function fill_one(worker, epoch, now, after, nonce, out)
  if not redis.call('ZSCORE', KEY.free, worker) and not redis.call('HGET', KEY.book .. worker, 'kept') then
    return 0, ''
  end
  local book = read_book(worker, epoch)
  if not book or book.lease <= now or book.status ~= 'ready' or over(book) then
    return 0, ''
  end
  local found
  if book.kept then
    local kept, head = book.kept, redis.call('ZSCORE', KEY.shapes, book.kept)
    local mine = redis.call('HGET', KEY.kept, kept) == worker
    if mine and head and serves(book, kept) and fits_empty(book, amounts_of(kept)) then
      if (book.allocated.slots or 0) > 0 then
        return 0, ''
      end
      found = {kept, head}
    end
    if mine then
      redis.call('HDEL', KEY.kept, kept)
    end
    redis.call('HDEL', KEY.book .. worker, 'kept')
    book.kept = nil
    write_book(book, {})
  end
  if room(book, 'slots') < 1 or (book.allocated.alone or 0) > 0 then
    return 0, ''
  end
  found = found or redis.call('ZRANGEBYSCORE', KEY.shapes, after == '' and '-inf' or '(' .. after, '+inf', 'WITHSCORES',
    'LIMIT', 0, LIMIT.shapes)
  local cursor = ''
  if #found == 2 * LIMIT.shapes then
    cursor = found[#found]
  end
  -- Candidates in order of their first jobs; a shape that does not fit now cannot fit later in this pass.
  local candidates = {}
  for i = 1, #found, 2 do
    local amounts = amounts_of(found[i])
    if serves(book, found[i]) and (fits(book, amounts) or (amounts.alone and fits_empty(book, amounts))) then
      candidates[#candidates + 1] = {shape = found[i], order = tonumber(found[i + 1]), amounts = amounts}
    end
  end
  local admitted, changed, freed = 0, {}, nil
  while #candidates > 0 do
    local first = table.remove(candidates, 1)
    local alone, occupied = first.amounts.alone, admitted > 0 or (book.allocated.slots or 0) > 0
    -- Its turn has come, and others run here: the worker is kept for it, unless another one is.
    local keep = alone and occupied and not is_kept_elsewhere(first.shape, first.amounts, worker, epoch, now)
    if keep or (not (alone and occupied) and fits(book, first.amounts)) then
      if admitted == LIMIT.most then
        cursor = after == '' and '-inf' or after
        break
      end
      if keep then
        redis.call('HSET', KEY.kept, first.shape, worker)
        redis.call('HSET', KEY.book .. worker, 'kept', first.shape)
        book.kept, cursor = first.shape, ''
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
      if alone then
        freed = not order and unkeep(first.shape, epoch) or nil
        if admitted > 0 then
          break
        end
      end
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
  elseif book.kept then
    write_book(book, {})
  end
  return admitted, cursor, freed
end

-- Admit to one worker what now fits on it, in order, looking at LIMIT.shapes shapes (those after the cursor `after`)
-- and admitting LIMIT.most jobs at the most. Returns the number admitted and the cursor to go on with, '' when done.
-- With a nonce the worker itself is asking: what is not large is handed over in `out`, without the way by the broker.
local function fill(worker, epoch, now, after, nonce, out)
  local admitted, cursor, freed = fill_one(worker, epoch, now, after, nonce, out)
  while freed do
    local _
    _, _, freed = fill_one(freed, epoch, now, '')
  end
  return admitted, cursor
end

-- After a job left the queue of a shape, otherwise than by `fill`.
local function leave_queue(shape, epoch, now)
  if refile(shape) or not string.find(shape, 'alone=', 1, true) then
    return
  end
  local freed = unkeep(shape, epoch)
  if freed then
    fill(freed, epoch, now, '')
  end
end
