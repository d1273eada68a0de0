#!lua flags=allow-oom
-- Does: takes back running jobs that the lists of their worker have not named for so long. It looks only at the named
--   jobs.
-- KEYS: none; by name: epoch, book, held, missing, free, free_of, allocated, allocated_cpus, view, job, unclaimed,
--   counters, stream, wait, shapes, shapes_of, asks, border, withheld, past, tenant_heads, totals, used
-- ARGV: epoch, run_id, worker, incarnation, most_losses, missing_for (ms for which no list has named a job before it is
--   taken back; 0: at once, because the list is known to be whole), then for each job that its list does not name: job
-- Replies: {ok, then for each job taken back: shape} | {unknown} | {cold} | {epoch, current}
-- Cost: at most eighteen commands a job, and a command for each index of free CPUs in which the worker stands
-- Repeat: harmless: judged by the time since the first list that lacked a job, not by the number of lists
missing_for = tonumber(missing_for)
local now = clock()
local book = read_book(worker, epoch)
if not book or book.incarnation ~= incarnation then
  return {'unknown'}
end
local reply = {'ok'}
for i = EACH.first, #ARGV, EACH.step do
  local id = ARGV[i + EACH.job]
  local job = read_job(id)
  -- A job that was admitted and not claimed yet is on its way: the deadline START (PLATFORM_START_TIMEOUT) covers it.
  if job and job.state == 'running' and redis.call('HGET', KEY.held .. worker, id) == token_of(job) then
    local attempt = id .. ' ' .. token_of(job)
    local since = redis.call('HGET', KEY.missing .. worker, attempt)
    -- The clock may have been set back since.
    local absent = math.max(0, now - tonumber(since or now))
    if absent < missing_for then
      if not since or tonumber(since) > now then
        redis.call('HSET', KEY.missing .. worker, attempt, int(now))
      end
    else
      allocate(book, amounts_of(job.shape), -1)
      -- A job that never started, because it was adopted from a row, is not lost.
      local started = job.started and job.started ~= '0' and job.started ~= ''
      put_back(id, job, now, started and 'lost' or 'taken_back', 'the worker no longer held it', most_losses)
      count('taken_back', 1)
      redis.call('HDEL', KEY.missing .. worker, attempt)
      reply[#reply + 1] = job.shape
    end
  end
end
if #reply > 1 then
  write_book(book)
  -- The caller fills the worker, unless it may not admit now.
  redis.call('HSET', KEY.book .. worker, 'unfilled', '1')
end
return reply
