#!lua flags=allow-oom
-- Does: finds jobs that differ between the ledger and Postgres, or that stand elsewhere than their own keys say.
-- KEYS: none; by name: epoch, job, wait, book, held, unclaimed, stream
-- ARGV: epoch, run_id, rows (one line for each job: job, state, token, worker; none has blanks; the state ended: the
--   job is over)
-- Replies: {ok, then for each job that differs: job} | {cold} | {epoch, current}
-- Cost: at most four commands a job, and one for each of their workers
-- Repeat: harmless: nothing is written
local epoch, run_id, rows = ARG.epoch, ARG.run_id, ARG.rows

local no = refused(epoch, run_id)
if no then
  return no
end
local reply, incarnations = {'ok'}, {}
for id, state, token, worker in string.gmatch(rows, '(%S+) (%S+) (%S+) (%S+)') do
  local v = redis.call('HMGET', KEY.job .. id, 'state', 'epoch', 'attempt', 'worker', 'shape', 'order', 'entry',
    'incarnation')
  local standing, holder, entry, right = v[1], v[4], v[7], false
  local held_token = v[2] and v[3] and v[2] .. '.' .. v[3]
  if standing == 'ended' then
    -- The end of the job may be on its way to Postgres, as below.
    right = entry or state == standing
  elseif standing == 'waiting' and v[5] then
    local place = redis.call('ZSCORE', KEY.wait .. v[5], id)
    right = place and tonumber(place) == tonumber(v[6])
  elseif (standing == 'admitted' or standing == 'running') and holder then
    if incarnations[holder] == nil then
      local book = redis.call('HMGET', KEY.book .. holder, 'epoch', 'lease', 'incarnation')
      incarnations[holder] = book[1] == epoch and book[2] and book[3]
    end
    -- The book may be that of the next incarnation of the worker.
    right = incarnations[holder] and incarnations[holder] == v[8]
      and redis.call('HGET', KEY.held .. holder, id) == held_token
      and (redis.call('ZSCORE', KEY.unclaimed, id) ~= false) == (standing == 'admitted')
  end
  if right and entry then
    -- The job's newest transition is on its way to Postgres, if it was not lost with the stream.
    right = #redis.call('XRANGE', KEY.stream, entry, entry, 'COUNT', 1) == 1
  elseif right then
    right = standing == state
      and (standing == 'waiting' or standing == 'ended' or (held_token == token and holder == worker))
  end
  if not right then
    reply[#reply + 1] = id
  end
end
return reply
