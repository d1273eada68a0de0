-- Does: admits a job whose row is durable to the best worker and delivers it, or files it in the backlog.
-- KEYS: none; by name: epoch, job, shapes, free, book, wait, counters, stream, held, unclaimed, view, allocated, allocated_cpus
-- ARGV: epoch, run_id, deadline (ms of the server), job, shape, order, message, attempt (admissions so far), losses, submitted (ms),
--   rerun (0: its first lost attempt ends it), digest of the message
-- Replies: {admitted, worker, attempt} | {waiting, cursor_score, cursor_worker} ('' when every candidate was looked at)
--   | {exists, state} | {late, now (ms)} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.candidates books are read; independent of the number of workers and of waiting jobs
-- Repeat: harmless: a job that is known (or ended within the last 60 s, by its tombstone) is left as it is
local epoch, run_id, deadline, id = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local shape, order, message = ARGV[5], ARGV[6], ARGV[7]
local attempt, losses, submitted, rerun, digest = ARGV[8], ARGV[9], ARGV[10], ARGV[11], ARGV[12]

local no = refused(epoch, run_id)
if no then
  return no
end
local now = clock()
if now > deadline then
  count('refused.late', 1)
  return {'late', int(now)}
end
local known = redis.call('HMGET', KEY.job .. id, 'state', 'final', 'attempt', 'outcome', 'became')
-- What its last attempt ended may go on all the same, with a successor of which only Postgres was told: then its row has
-- that attempt. (One that was revoked or expired does not; and what was submitted before has an older attempt.)
local went_on = known[4] and known[5] ~= 'cancelled' and known[5] ~= 'expired' and tonumber(known[3]) == tonumber(attempt)
if known[1] and (known[1] ~= 'ended' or (known[2] and not went_on) or tonumber(known[3]) > tonumber(attempt)) then
  return {'exists', known[1]}
end
local job = {epoch = epoch, attempt = attempt, shape = shape, order = order, losses = losses, submitted = submitted}
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
if not redis.call('ZSCORE', KEY.shapes, shape) then
  local amounts = amounts_of(shape)
  local least, looked_at = int(amounts.cpus or 0), 0
  -- The first few are nearly always enough; the others are fetched only when they are needed.
  for _, size in ipairs({LIMIT.few, LIMIT.candidates - LIMIT.few}) do
    local found = redis.call('ZRANGEBYSCORE', KEY.free, least, '+inf', 'LIMIT', looked_at, size)
    local book = first_with_room(found, epoch, now, amounts)
    if book then
      job.attempt = int(tonumber(attempt) + 1)
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
redis.call('HSET', KEY.job .. id, 'state', 'waiting', 'epoch', epoch, 'attempt', attempt, 'shape', shape, 'order', order,
  'losses', losses, 'submitted', submitted, 'message', message, 'entry', job.entry, 'noted', job.noted,
  unpack(job.first))
file(id, shape, order)
count('filed', 1)
return {'waiting', cursor_score, cursor_worker}
