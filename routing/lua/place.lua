#!lua flags=allow-oom
-- Does: looks for a worker for the first waiting job of a shape, among the candidates after a cursor, and admits it.
-- KEYS: none; by name: epoch, job, shapes, free, book, wait, counters, stream, held, unclaimed, view, allocated, allocated_cpus, kept
-- ARGV: epoch, run_id, shape, cursor_score, cursor_worker (both '' to begin)
-- Replies: {admitted, job, worker, attempt} | {more, cursor_score, cursor_worker} | {none} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.candidates books are read
-- Repeat: harmless: the job that was admitted waits no longer, the next one is looked at
local epoch, run_id, shape, cursor_score, cursor_worker = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

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
local start
if cursor_worker == '' then
  start = redis.call('ZCOUNT', KEY.free, '-inf', '(' .. int(amounts.cpus or 0))
elseif redis.call('ZSCORE', KEY.free, cursor_worker) == cursor_score then
  start = redis.call('ZRANK', KEY.free, cursor_worker) + 1
else
  -- The worker at the cursor moved meanwhile: begin again with those that have as much as it had.
  start = redis.call('ZCOUNT', KEY.free, '-inf', '(' .. cursor_score)
end
local found = redis.call('ZRANGE', KEY.free, start, start + LIMIT.candidates - 1)
local book = first_with_room(found, epoch, now, amounts)
if book then
  redis.call('ZREM', KEY.wait .. shape, head)
  local job = read_job(head)
  local message = job and redis.call('HGET', KEY.job .. head, 'message')
  if not message then
    count('drift', 1)
    leave_queue(shape, epoch, now)
    return {'more', cursor_score, cursor_worker}
  end
  job.epoch, job.attempt = epoch, int(tonumber(job.attempt) + 1)
  grant(head, job, message, book, now)
  enter(book, amounts)
  count('admitted', 1)
  leave_queue(shape, epoch, now)
  return {'admitted', head, book.worker, job.attempt}
end
if #found == LIMIT.candidates then
  return {'more', redis.call('ZSCORE', KEY.free, found[#found]), found[#found]}
end
return {'none'}
