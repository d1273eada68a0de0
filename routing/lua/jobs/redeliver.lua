#!lua flags=allow-oom
-- Does: delivers again the messages of jobs that were admitted and not claimed in time. The attempt stays the same.
-- KEYS: none; by name: epoch, unclaimed, job, book, counters
-- ARGV: epoch, run_id, most (jobs to look at in this call)
-- Replies: {ok, looked (number of jobs looked at), delivered} | {cold} | {epoch, current}
-- Cost: at most six commands a job
-- Repeat: harmless: the claim refuses a second copy of a message; the time to the next delivery doubles each time
most = tonumber(most)
local now = clock()
local delivered = 0
local due = redis.call('ZRANGEBYSCORE', KEY.unclaimed, '-inf', int(now), 'LIMIT', 0, most)
for _, id in ipairs(due) do
  local job = read_job(id)
  local queue = job and job.worker and redis.call('HGET', KEY.book .. job.worker, 'queue')
  local message = queue and message_of(id, job) or ''
  if job and job.state == 'admitted' and message ~= '' then
    local times = tonumber(job.redelivered or '0') + 1
    job.redelivered = int(times)
    write_job(id, job)
    redis.call('ZADD', KEY.unclaimed, int(now + LIMIT.start * math.pow(2, math.min(times, 6))), id)
    -- A worker whose book is only reserved has no queue before it registers.
    if queue ~= '' then
      redis.call('LPUSH', queue, tagged(message, id, job))
      delivered = delivered + 1
    end
  else
    redis.call('ZREM', KEY.unclaimed, id)
  end
end
if delivered > 0 then
  count('redelivered', delivered)
end
return {'ok', int(#due), int(delivered)}
