-- The value of a job's key.

-- A message as the value of a waiting job keeps it: with one byte for the job's id, and one for each text that nearly
-- all messages share. The platform writes messages as JSON without such bytes; any other message stays as it is. It
-- begins with a brace, a packed one with the byte 1.
local function packed(message, id)
  if #message > LIMIT.packed or not string.find(message, '"capacity_request":{"shape":"', 1, true) then
    return message
  end
  local parts, n, at = {'\1'}, 1, 1
  for number, text in ipairs(LIMIT.texts) do
    local from, to = string.find(message, text, at, true)
    if from then
      parts[n + 1], parts[n + 2], n, at = string.sub(message, at, from - 1), string.char(number + 2), n + 2, to + 1
    end
  end
  parts[n + 1] = string.sub(message, at)
  local id_pattern = string.gsub(id, '%W', '%%%0')
  return (string.gsub(table.concat(parts), id_pattern, '\2'))
end

-- The whole message again.
local function unpacked(message, id)
  if string.byte(message) ~= 1 then
    return message
  end
  local texts = {['\2'] = id}
  for number, text in ipairs(LIMIT.texts) do
    texts[string.char(number + 2)] = text
  end
  return (string.gsub(string.sub(message, 2), '%c', texts))
end

-- A job as the ledger has it, or nil. The value of its key is a head and the message. The head has a line for each
-- field that most jobs have, empty where a job lacks it, and a line of marks (name=value,name=value,). Blanks fill it
-- up to its `width`. The message is read only where it is asked for (`whole`).
local function read_job(id, whole)
  local key = KEY.job .. id
  local value = whole and (redis.call('GET', key) or '') or redis.call('GETRANGE', key, 0, LIMIT.head - 1)
  if value == '' then
    return nil
  end
  local state, entry, noted, epoch, attempt, worker, incarnation, shape, order, admitted, started, nonce, losses,
    submitted, digest, marks, at = string.match(value, LIMIT.job)
  if not state then
    -- A head that is longer than usual.
    return not whole and read_job(id, true) or nil
  end
  local job = {state = state, entry = entry ~= '' and entry or nil, noted = noted ~= '' and noted or nil, epoch = epoch,
    attempt = attempt, worker = worker ~= '' and worker or nil, incarnation = incarnation ~= '' and incarnation or nil,
    shape = shape ~= '' and shape or nil, order = order ~= '' and order or nil,
    admitted = admitted ~= '' and admitted or nil, started = started ~= '' and started or nil,
    nonce = nonce ~= '' and nonce or nil, losses = losses ~= '' and losses or nil,
    submitted = submitted ~= '' and submitted or nil, digest = digest ~= '' and digest or nil, width = at - 2}
  if marks ~= '' then
    for name, mark in string.gmatch(marks, '(%l+)=([^,]*),') do
      job[name] = mark
    end
  end
  if whole then
    job.message = unpacked(string.sub(value, at), id)
  end
  return job
end

-- The message of a job, '' where the ledger has none.
local function message_of(id, job)
  return job.message or job.width and unpacked(redis.call('GETRANGE', KEY.job .. id, job.width + 1, -1), id) or ''
end

-- Write a job as `read_job` reads it. With `expiry` its key lasts for so many milliseconds. The message stays where it
-- is while the new head has room before it. An admitted job gets such room, for its claim.
local function write_job(id, job, expiry)
  local marks = ''
  if job.final or job.rerun or job.successor or job.revoked or job.redelivered or job.outcome or job.became
      or job.counted then
    for _, name in ipairs({'rerun', 'redelivered', 'successor', 'revoked', 'outcome', 'became', 'final', 'counted'}) do
      if job[name] then
        marks = marks .. name .. '=' .. job[name] .. ','
      end
    end
  end
  local key, head = KEY.job .. id, job.state .. '\n' .. (job.entry or '') .. '\n' .. (job.noted or '') .. '\n'
    .. job.epoch .. '\n' .. job.attempt .. '\n' .. (job.worker or '') .. '\n' .. (job.incarnation or '') .. '\n'
    .. (job.shape or '') .. '\n' .. (job.order or '') .. '\n' .. (job.admitted or '') .. '\n' .. (job.started or '')
    .. '\n' .. (job.nonce or '') .. '\n' .. (job.losses or '') .. '\n' .. (job.submitted or '') .. '\n'
    .. (job.digest or '') .. '\n' .. marks .. '\n'
  if expiry then
    redis.call('SET', key, head .. '\n', 'PX', expiry)
  elseif job.width and #head <= job.width then
    redis.call('SETRANGE', key, 0, head .. string.rep(' ', job.width - #head))
  else
    local message = message_of(id, job)
    if job.state == 'admitted' then
      head = head .. LIMIT.room
    elseif job.state == 'waiting' then
      message = packed(message, id)
    end
    job.width = #head
    redis.call('SET', key, head .. '\n' .. message)
  end
end
