#!lua flags=allow-oom
-- Does: closes a worker whose lease ran out. Once the grace is over too, it takes the named jobs back as new attempts,
--   and removes the book of a worker that holds no job any more.
-- KEYS: none; by name: epoch, book, held, job, unclaimed, missing, counters, stream, wait, shapes, shapes_of, asks,
--   free, free_of, leases, view, allocated, allocated_cpus, border, withheld, past, tenant_heads, totals, used, asked
-- ARGV: epoch, run_id, worker, grace (ms after the end of the lease, and after this script first saw that end: the
--   clock may have been set meanwhile), most_losses, take (1: take back, 0: only say if it is time), ttl (ms: a lease
--   with more time left was written before the clock was set back, and is shortened to this), then for each job: job
-- Replies: {alive, incarnation} | {closed (just now) | waits (for the grace, as before) | due, incarnation}
--   | {more | gone, incarnation, then for each job taken back: shape} | {unknown} | {cold} | {epoch, current}
-- Cost: at most fifteen commands a job, and two for each index of free CPUs in which the worker stands
-- Repeat: harmless: goes on from its last step
grace, ttl = tonumber(grace), tonumber(ttl)
local now = clock()
local book = read_book(worker, epoch)
if not book then
  note_lost_book(worker)
  redis.call('ZREM', KEY.leases, worker)
  return {'unknown'}
end
if book.lease > now + ttl then
  book.lease = now + ttl
  redis.call('HSET', KEY.book .. worker, 'lease', int(book.lease))
  redis.call('ZADD', KEY.leases, int(book.lease), worker)
end
if book.lease > now then
  return {'alive', book.incarnation or ''}
end
local verdict = 'waits'
-- A draining worker stays so. Should it be alive after all, it does not open again.
if book.status == 'ready' then
  verdict, book.status = 'closed', 'closed'
  redis.call('HSET', KEY.book .. worker, 'status', 'closed')
  count('lapsed', 1)
end
withdraw(worker)
redis.call('DEL', KEY.view .. worker)
if not book.lapsed then
  book.lapsed = int(now)
  redis.call('HSET', KEY.book .. worker, 'lapsed', book.lapsed)
end
if now < math.max(book.lease, tonumber(book.lapsed)) + grace then
  return {verdict, book.incarnation or ''}
end
if take ~= '1' then
  return {'due', book.incarnation or ''}
end
local reply = {'gone', book.incarnation or ''}
for i = EACH.first, #ARGV, EACH.step do
  local id = ARGV[i + EACH.job]
  local job = read_job(id)
  if job and job.worker == worker and (job.state == 'admitted' or job.state == 'running') then
    allocate(book, amounts_of(job.shape), -1)
    -- Only an attempt that started counts as lost. An attempt that did not start is innocent, and one that is adopted
    -- from a row may not have started.
    local outcome = tonumber(job.started or '') and job.started ~= '0' and 'lost' or 'taken_back'
    if outcome == 'taken_back' and job.state == 'running' and (job.losses or '0') == '0' and job.rerun ~= '0'
        and tonumber(most_losses) >= LIMIT.doubt then
      -- The job is adopted from its row, in which a claim may be missing: see `losses_in_doubt` of
      -- routing/policy/unknown_starts.py.
      job.losses = '1'
    end
    put_back(id, job, now, outcome, 'worker ' .. worker .. ' was lost', most_losses)
    reply[#reply + 1] = job.shape
  else
    redis.call('HDEL', KEY.held .. worker, id)
  end
end
write_book(book)
if redis.call('EXISTS', KEY.held .. worker) == 1 then
  reply[1] = 'more'
else
  redis.call('UNLINK', KEY.book .. worker, KEY.missing .. worker)
  if book.queue and book.queue ~= '' then
    redis.call('UNLINK', book.queue)
  end
  redis.call('ZREM', KEY.leases, worker)
end
return reply
