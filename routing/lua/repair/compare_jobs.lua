#!lua flags=allow-oom
-- Does: finds jobs that differ between the ledger and Postgres, or that stand elsewhere than their own keys say.
-- KEYS: none; by name: epoch, job, wait, book, held, unclaimed, stream
-- ARGV: epoch, run_id, rows (one line for each job: job, state, token, worker, order; none has blanks; the state
--   ended: the job is over)
-- Replies: {ok, then for each job that differs: job} | {cold} | {epoch, current}
-- Cost: at most four commands a job, and one for each of their workers
-- Repeat: harmless: nothing is written
local reply, incarnations = {'ok'}, {}
for id, state, token, worker, order in string.gmatch(rows, '(%S+) (%S+) (%S+) (%S+) (%S+)') do
  local job = read_job(id) or {}
  local standing, holder, entry, right = job.state, job.worker, job.entry, false
  local held_token = standing and token_of(job)
  if standing == 'ended' then
    -- The end of the job may be on its way to Postgres, as below.
    right = entry or state == standing
  elseif standing == 'waiting' and job.shape then
    local place = redis.call('ZSCORE', KEY.wait .. job.shape, id)
    right = place and tonumber(place) == tonumber(job.order)
  elseif (standing == 'admitted' or standing == 'running') and holder then
    if incarnations[holder] == nil then
      local book = redis.call('HMGET', KEY.book .. holder, 'epoch', 'lease', 'incarnation')
      incarnations[holder] = book[1] == epoch and book[2] and book[3]
    end
    -- The book may be that of the next incarnation of the worker.
    right = incarnations[holder] and incarnations[holder] == job.incarnation
      and redis.call('HGET', KEY.held .. holder, id) == held_token
      and (redis.call('ZSCORE', KEY.unclaimed, id) ~= false) == (standing == 'admitted')
  end
  if right and entry then
    -- The job's newest transition is on its way to Postgres, if it was not lost with the stream.
    right = #redis.call('XRANGE', KEY.stream, entry, entry, 'COUNT', 1) == 1
  elseif right then
    right = standing == state and (standing == 'ended' or (held_token == token and holder == worker)
      or (standing == 'waiting' and tonumber(job.order) == tonumber(order)))
  end
  if not right then
    reply[#reply + 1] = id
  end
end
return reply
