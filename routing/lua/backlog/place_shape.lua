#!lua flags=allow-oom
-- Does: looks for a worker for the first waiting job of a shape, among the candidates after a cursor, and admits it.
-- KEYS: none; by name: epoch, job, shapes, shapes_of, free, free_of, book, wait, counters, stream, held, unclaimed,
--   view, allocated, allocated_cpus, kept, tasks
-- ARGV: epoch, run_id, shape, cursor_score, cursor_worker (both '' to begin)
-- Replies: {admitted, job, worker, attempt} | {more, cursor_score, cursor_worker} | {none} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.candidates books are read, and LIMIT.most places without their waiting jobs are passed;
--   LIMIT.freed passes like that of fill where a worker was kept for this shape
-- Repeat: harmless: the admitted job waits no longer, and the next one is looked at
local epoch, run_id, shape = ARG.epoch, ARG.run_id, ARG.shape
local cursor_score, cursor_worker = ARG.cursor_score, ARG.cursor_worker

local no = refused(epoch, run_id)
if no then
  return no
end
local now = clock()
local amounts = amounts_of(shape)
local head = redis.call('ZRANGE', KEY.wait .. shape, 0, 0)[1]
if not head then
  return {'none'}
end
local index, start = index_for(amounts), nil
if cursor_worker == '' then
  start = redis.call('ZCOUNT', index, '-inf', '(' .. int(amounts.cpus or 0))
elseif redis.call('ZSCORE', index, cursor_worker) == cursor_score then
  start = redis.call('ZRANK', index, cursor_worker) + 1
else
  -- The worker at the cursor moved meanwhile. Begin again with the workers that have as many free CPUs as it had.
  start = redis.call('ZCOUNT', index, '-inf', '(' .. cursor_score)
end
local candidates = redis.call('ZRANGE', index, start, start + LIMIT.candidates - 1)
local book = first_with_room(index, candidates, epoch, now, shape, amounts)
if book then
  local admitted
  -- No more than LIMIT.most places without their waiting jobs are passed in one step.
  for _ = 1, LIMIT.most do
    redis.call('ZREM', KEY.wait .. shape, head)
    local job = read_job(head)
    local message = job and job.state == 'waiting' and redis.call('HGET', KEY.job .. head, 'message')
    if message then
      job.epoch, job.attempt = epoch, int(tonumber(job.attempt) + 1)
      admit_job(head, job, message, book, now)
      enter(book, amounts)
      count('admitted', 1)
      admitted = {'admitted', head, book.worker, job.attempt}
      break
    end
    count('drift', 1)
    head = redis.call('ZRANGE', KEY.wait .. shape, 0, 0)[1]
    if not head then
      break
    end
  end
  local freed = leave_queue(shape, epoch)
  if freed then
    fill_freed(freed, epoch, now)
  end
  return admitted or {'more', cursor_score, cursor_worker}
end
if #candidates == LIMIT.candidates then
  return {'more', redis.call('ZSCORE', index, candidates[#candidates]), candidates[#candidates]}
end
return {'none'}
