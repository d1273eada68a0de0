-- Batches of jobs that one script brings in.
--
-- A batch holds consecutive jobs of one shape. Where one job of a batch finds no room, no later one does. The worker
-- that took a job is the best for the next one as long as it has room: it had the least free CPUs that sufficed, and
-- has fewer now. So a batch searches once. Its changes beside the jobs' own keys are written by `write_batch` at its
-- end: before anything else looks there, or once it is as long as a command may be.

-- Write the changes of a batch, at its end.
--
-- A batch has `shape`, `amounts`, `looked` (workers at which this script has looked), and `full` where all later jobs
-- are filed. Until they are written it has `book` and the admissions there: `tokens` (id, token, id, token, ...), `due`
-- (time, id, time, id, ...) and `messages`. It also has `waiting`, as `file` takes it, with `first`, the least of its
-- orders.
local function write_batch(batch)
  if batch.messages then
    enter(batch.book, {})
    redis.call('HSET', KEY.held .. batch.book.worker, unpack(batch.tokens))
    redis.call('ZADD', KEY.unclaimed, unpack(batch.due))
    redis.call('LPUSH', batch.book.queue, unpack(batch.messages))
    count('admitted', #batch.messages)
    batch.messages = nil
  end
  if batch.waiting then
    file(batch.shape, batch.waiting, batch.first)
    count('filed', #batch.waiting / 2)
    batch.waiting = nil
  end
end

-- Find the best worker for a batch. Returns its book, or nil and the cursor behind which there may be others. One
-- script looks at LIMIT.searched workers. After that it looks at none, and the caller goes on from the beginning.
local function find_worker(batch, epoch, now)
  if batch.looked >= LIMIT.searched then
    return nil, '0', ''
  end
  local index = index_for(batch.amounts)
  local least, looked_at, last = int(batch.amounts.cpus or 0), 0, nil
  -- The first few are nearly always enough. The others are fetched only when they are needed.
  for _, size in ipairs({LIMIT.few, LIMIT.candidates - LIMIT.few}) do
    local candidates = redis.call('ZRANGEBYSCORE', index, least, '+inf', 'LIMIT', looked_at, size)
    local book = first_with_room(index, candidates, epoch, now, batch.shape, batch.amounts)
    if book then
      batch.looked = batch.looked + #candidates
      return book
    end
    looked_at, batch.looked = looked_at + #candidates, batch.looked + #candidates
    if #candidates < size then
      break
    end
    last = candidates[#candidates]
  end
  if looked_at == LIMIT.candidates then
    return nil, redis.call('ZSCORE', index, last), last
  end
  return nil, '', ''
end
