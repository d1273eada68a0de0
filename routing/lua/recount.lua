#!lua flags=allow-oom
-- Does: makes a worker's allocations the sum of what it holds, and repairs its place in the index and in the sums.
-- KEYS: none; by name: epoch, book, held, job, free, view, allocated, allocated_cpus
-- ARGV: epoch, run_id, worker
-- Replies: {ok, number of fields that differed} | {unknown} | {cold} | {epoch, current}
-- Cost: grows with the jobs that this worker holds
-- Repeat: harmless
local epoch, run_id, worker = ARGV[1], ARGV[2], ARGV[3]

local no = refused(epoch, run_id)
if no then
  return no
end
local book = read_book(worker, epoch)
if not book then
  return {'unknown'}
end
local sums, different = {}, 0
local held = redis.call('HGETALL', KEY.held .. worker)
for i = 1, #held, 2 do
  local job = read_job(held[i])
  if job and job.worker == worker and token_of(job) == held[i + 1] and (job.state == 'admitted' or job.state == 'running') then
    for name, amount in pairs(amounts_of(job.shape)) do
      sums[name] = (sums[name] or 0) + amount
    end
  else
    redis.call('HDEL', KEY.held .. worker, held[i])
    different = different + 1
  end
end
local changed = {}
for name, allocated in pairs(book.allocated) do
  if allocated ~= (sums[name] or 0) then
    changed[name] = (sums[name] or 0) - allocated
    different = different + 1
  end
end
for name, sum in pairs(sums) do
  if not book.allocated[name] then
    changed[name] = sum
    different = different + 1
  end
end
write_book(book, changed)
return {'ok', int(different)}
