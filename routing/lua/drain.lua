#!lua flags=allow-oom
-- Does: admits nothing more to a worker, and hands back what was admitted to it and not started.
-- KEYS: none; by name: epoch, book, held, job, unclaimed, counters, stream, wait, shapes, shapes_of, free, free_of, view,
--   allocated, allocated_cpus
-- ARGV: epoch, run_id, worker, incarnation
-- Replies: {ok, then the shapes of the jobs handed back} | {unknown} | {cold} | {epoch, current}
-- Cost: grows with the jobs that this worker holds
-- Repeat: harmless
local epoch, run_id, worker, incarnation = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local no = refused(epoch, run_id)
if no then
  return no
end
local now = clock()
local book = read_book(worker, epoch)
if not book or book.incarnation ~= incarnation then
  return {'unknown'}
end
book.status = 'draining'
redis.call('HSET', KEY.book .. worker, 'status', 'draining')
if redis.call('EXISTS', KEY.view .. worker) == 1 then
  redis.call('HSET', KEY.view .. worker, 'status', 'draining')
end
local reply, changed = {'ok'}, {}
for _, id in ipairs(redis.call('HKEYS', KEY.held .. worker)) do
  local job = read_job(id)
  if job and job.state == 'admitted' then
    for name, amount in pairs(amounts_of(job.shape)) do
      changed[name] = (changed[name] or 0) - amount
    end
    put_back(id, job, now, 'handed_back', '', '0')
    count('handed_back', 1)
    reply[#reply + 1] = job.shape
  end
end
write_book(book, changed)
return reply
