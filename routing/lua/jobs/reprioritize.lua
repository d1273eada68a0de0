#!lua flags=allow-oom
-- Does: gives jobs the places in the backlog that their new priorities make. The next attempt of a held job has it.
-- KEYS: none; by name: epoch, asks, border, job, left, low, shapes, shapes_of, wait, tenant_heads
-- ARGV: epoch, run_id, then for each job (at most LIMIT.shapes): job, order, behind (the shape under which it waits in
--   Postgres alone, '': it does not)
-- Replies: {ok, then for each job: moved | held | staying (in Postgres) | missing} | {cold} | {epoch, current}
-- Cost: at most eighteen commands a job
-- Repeat: harmless
local reply = {'ok'}
for i = EACH.first, #ARGV, EACH.step do
  local id, order, behind = ARGV[i + EACH.job], ARGV[i + EACH.order], ARGV[i + EACH.behind]
  local job, verdict = read_job(id), 'missing'
  local shape = nil
  if job and job.state ~= 'ended' then
    verdict = job.state == 'waiting' and 'moved' or 'held'
    job.order = order
    write_job(id, job)
    if verdict == 'moved' then
      shape = job.shape
      redis.call('ZADD', KEY.wait .. shape, 'XX', order, id)
    end
  elseif behind ~= '' then
    -- The runner may be fetching other jobs of the shape: `left` keeps the border before this one.
    verdict, shape = 'staying', behind
    redis.call('ZADD', KEY.left, 'LT', order, shape)
    redis.call('ZADD', KEY.border, 'LT', order, shape)
    redis.call('HSET', KEY.epoch, 'stay', '1')
  end
  if shape and refile(shape) then
    note_asked(shape)
  end
  reply[#reply + 1] = verdict
end
return reply
