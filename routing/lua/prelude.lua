-- Shared by the scripts of the ledger: the loader puts in front of each the functions that it uses, and writes the values
-- of KEY, STEP and LIMIT (routing/keys.py, routing/states.py, routing/policy.py) where their names stand. Server time is
-- spent at every call on each function that is there, so there are no others.

-- A whole number as text: tostring() would write 1e+15.
local function int(number)
  return string.format('%.0f', number)
end

-- The server's clock in milliseconds: clients' clocks are not trusted.
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- nil when this caller may act on these books, else the reply that refuses it.
local function refused(epoch, run_id)
  local current = redis.call('HMGET', KEY.epoch, 'epoch', 'run_id')
  if not current[1] or current[2] ~= run_id then
    return {'cold'}
  end
  if current[1] ~= epoch then
    return {'epoch', current[1]}
  end
  return nil
end

local function count(what, by)
  redis.call('HINCRBY', KEY.counters, what, by)
end

-- "cpus=4000,slots=1" as {cpus = 4000, slots = 1}.
local function amounts_of(shape)
  local amounts = {}
  for name, amount in string.gmatch(shape, '([^=,]+)=(%d+)') do
    amounts[name] = tonumber(amount)
  end
  return amounts
end

-- Millicores as people read them: 72000 -> 72, 500 -> 0.5.
local function cpus_text(millicores)
  if millicores % 1000 == 0 then
    return int(millicores / 1000)
  end
  local text = string.format('%.3f', millicores / 1000)
  text = string.gsub(text, '0+$', '')
  return (string.gsub(text, '%.$', ''))
end

-- A worker's whole book, or nil where it is missing or of another epoch (COLD for that worker, never 0).
local function read_book(worker, epoch)
  local flat = redis.call('HGETALL', KEY.book .. worker)
  local book = {worker = worker, capacity = {}, allocated = {}}
  for i = 1, #flat, 2 do
    local field, value = flat[i], flat[i + 1]
    local kind = string.sub(field, 1, 2)
    if kind == 'c.' then
      book.capacity[string.sub(field, 3)] = tonumber(value)
    elseif kind == 'a.' then
      book.allocated[string.sub(field, 3)] = tonumber(value)
    else
      book[field] = value
    end
  end
  if book.epoch ~= epoch or not book.lease then
    return nil
  end
  book.lease = tonumber(book.lease)
  return book
end

local function room(book, name)
  return (book.capacity[name] or 0) - (book.allocated[name] or 0)
end

-- Does the whole vector fit into what is free?
local function fits(book, amounts)
  for name, amount in pairs(amounts) do
    if room(book, name) < amount then
      return false
    end
  end
  return true
end

-- More allocated than there is, in any resource: nothing is admitted until it fits again.
local function over(book)
  for name, amount in pairs(book.allocated) do
    if amount > (book.capacity[name] or 0) then
      return true
    end
  end
  return false
end

-- Write the difference that allocations made on a book: the book itself, the sums, the view for people.
local function write_amounts(book, changed)
  local fields, shown, n, m = {}, {}, 0, 0
  for name, difference in pairs(changed) do
    local allocated = (book.allocated[name] or 0) + difference
    book.allocated[name] = allocated
    fields[n + 1], fields[n + 2], n = 'a.' .. name, int(allocated), n + 2
    if name == 'cpus' then
      shown[m + 1], shown[m + 2], m = 'allocated_cpus', cpus_text(allocated), m + 2
    elseif name == 'memory' or name == 'slots' then
      shown[m + 1], shown[m + 2], m = 'allocated_' .. name, int(allocated), m + 2
    end
  end
  if n > 0 then
    redis.call('HSET', KEY.book .. book.worker, unpack(fields))
  end
  local cpus = changed.cpus or 0
  if cpus ~= 0 then
    redis.call('SET', KEY.allocated_cpus, cpus_text(redis.call('INCRBY', KEY.allocated, int(cpus))))
  end
  if m > 0 and redis.call('EXISTS', KEY.view .. book.worker) == 1 then
    redis.call('HSET', KEY.view .. book.worker, unpack(shown))
  end
end

-- The same for a whole book, whose place in the index of free CPUs is found anew. In the index stand the workers that
-- may be admitted to: ready, not over their capacity, and with a slot free, which every job needs.
local function write_book(book, changed)
  write_amounts(book, changed)
  local too_much = over(book)
  if book.shrunk and not too_much then
    redis.call('HDEL', KEY.book .. book.worker, 'shrunk')
  end
  if book.status == 'ready' and not too_much and room(book, 'slots') >= 1 then
    redis.call('ZADD', KEY.free, int(room(book, 'cpus')), book.worker)
  else
    redis.call('ZREM', KEY.free, book.worker)
  end
end

-- All that a book has allocated, into a view that was made just now.
local function show(book)
  redis.call('HSET', KEY.view .. book.worker, 'allocated_cpus', cpus_text(book.allocated.cpus or 0),
    'allocated_memory', int(book.allocated.memory or 0), 'allocated_slots', int(book.allocated.slots or 0))
end

-- What admission asks of a book: the fields for these amounts, always in the same order.
local function asked_fields(amounts)
  local fields, names = {'epoch', 'lease', 'incarnation', 'queue', 'c.cpus', 'a.cpus', 'c.slots', 'a.slots'}, {'cpus', 'slots'}
  for name in pairs(amounts) do
    if name ~= 'cpus' and name ~= 'slots' then
      names[#names + 1] = name
      fields[#fields + 1] = 'c.' .. name
      fields[#fields + 1] = 'a.' .. name
    end
  end
  return fields, names
end

-- The part of a candidate's book that these amounts concern, if it has room for all of them and its lease lives.
local function with_room(worker, epoch, now, amounts, fields, names)
  local values = redis.call('HMGET', KEY.book .. worker, unpack(fields))
  if values[1] ~= epoch or not values[2] or tonumber(values[2]) <= now then
    return nil
  end
  local book = {worker = worker, incarnation = values[3], queue = values[4], capacity = {}, allocated = {}}
  for i, name in ipairs(names) do
    local capacity, allocated = tonumber(values[3 + 2 * i] or '0'), tonumber(values[4 + 2 * i] or '0')
    if amounts[name] and capacity - allocated < amounts[name] then
      return nil
    end
    book.capacity[name], book.allocated[name] = capacity, allocated
  end
  return book
end

-- The first of some candidates that has room: its book, or nil.
local function first_with_room(candidates, epoch, now, amounts)
  local fields, names = asked_fields(amounts)
  for _, worker in ipairs(candidates) do
    local book = with_room(worker, epoch, now, amounts, fields, names)
    if book then
      return book
    end
  end
  return nil
end

-- Enter an admission into the book that with_room gave.
local function enter(book, amounts)
  write_amounts(book, amounts)
  if book.capacity.slots > book.allocated.slots then
    redis.call('ZADD', KEY.free, int(book.capacity.cpus - book.allocated.cpus), book.worker)
  else
    redis.call('ZREM', KEY.free, book.worker)
  end
end

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
