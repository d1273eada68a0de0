#!lua flags=allow-oom
-- Does: renews the lease of a worker and its view, and takes back running jobs that its lists have not named for so long.
-- KEYS: none; by name: epoch, book, held, missing, view, leases, indexed, free, free_of, allocated, allocated_cpus, job,
--   unclaimed, counters, stream, wait, shapes, shapes_of, kept
-- ARGV: epoch, run_id, worker, incarnation, ttl (ms), most_losses, admit (1: go on to admit, 0: this caller may not),
--   missing (ms for which no list has named a job that is taken back; 0: at once, the list is known to be whole; negative:
--   no job is judged), number of view arguments, the view's fields: name, value, ..., then the ids of the jobs that the
--   worker holds
-- Replies: {ok, admitted, cursor of shapes, then the shapes of jobs that were taken back} | {unknown} | {cold} | {epoch, current}
-- Cost: grows with the jobs that this worker holds
-- Repeat: harmless: what a list lacks is judged by the time since the first list that lacked it, not by their number
local epoch, run_id, worker, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local ttl, most_losses, admit = tonumber(ARGV[5]), ARGV[6], ARGV[7]
local missing_for, view_size = tonumber(ARGV[8]), tonumber(ARGV[9])

local no = refused(epoch, run_id)
if no then
  return no
end
local now = clock()
local book = read_book(worker, epoch)
-- A book that was only reserved for it has no queue: this worker has to register.
if not book or book.incarnation ~= incarnation or book.queue == '' then
  return {'unknown'}
end
book.lease = now + ttl
-- A worker that the lapse closed, and that is alive after all, is open again.
if book.status == 'closed' then
  book.status = 'ready'
end
redis.call('HSET', KEY.book .. worker, 'lease', int(book.lease), 'status', book.status)
if book.lapsed then
  redis.call('HDEL', KEY.book .. worker, 'lapsed')
end
redis.call('ZADD', KEY.leases, int(book.lease), worker)
redis.call('ZADD', KEY.indexed, int(book.lease), worker)
if view_size > 0 then
  redis.call('HSET', KEY.view .. worker, unpack(ARGV, 10, 9 + view_size))
end
redis.call('HSET', KEY.view .. worker, 'status', book.status)
redis.call('PEXPIRE', KEY.view .. worker, int(ttl))

local named, before, missing = {}, {}, {}
for i = 10 + view_size, #ARGV do
  named[ARGV[i]] = true
end
-- (A version before kept a set here, without times.)
if redis.call('TYPE', KEY.missing .. worker).ok == 'hash' then
  local flat = redis.call('HGETALL', KEY.missing .. worker)
  for i = 1, #flat, 2 do
    -- (The clock may have been set back since.)
    before[flat[i]] = math.min(tonumber(flat[i + 1]), now)
  end
end
local reply, changed = {'ok', '0', ''}, {}
for _, id in ipairs(missing_for >= 0 and redis.call('HKEYS', KEY.held .. worker) or {}) do
  local job = not named[id] and read_job(id)
  -- What was admitted and not claimed yet is on its way: START looks after it.
  if job and job.state == 'running' then
    local attempt = id .. ' ' .. token_of(job)
    local since = before[attempt] or now
    if now - since < missing_for then
      missing[#missing + 1], missing[#missing + 2] = attempt, int(since)
    else
      for name, amount in pairs(amounts_of(job.shape)) do
        changed[name] = (changed[name] or 0) - amount
      end
      -- One that never started (it is adopted from a row) is not lost.
      local started = job.started and job.started ~= '0' and job.started ~= ''
      put_back(id, job, now, started and 'lost' or 'taken_back', 'the worker no longer held it', most_losses)
      count('taken_back', 1)
      reply[#reply + 1] = job.shape
    end
  end
end
if missing_for >= 0 then
  redis.call('DEL', KEY.missing .. worker)
  for i = 1, #missing, 2 do
    redis.call('HSET', KEY.missing .. worker, missing[i], missing[i + 1])
  end
end
show(book)
choose_places(book)
write_book(book, changed)
local admitted, cursor = 0, ''
if admit == '1' then
  admitted, cursor = fill(worker, epoch, now, '')
end
reply[2], reply[3] = int(admitted), cursor
return reply
