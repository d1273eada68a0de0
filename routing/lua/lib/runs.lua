-- Runs of jobs that one script brings in.
--
-- A run is a row of consecutive jobs of one shape. Where one job of a run finds no room, no later one does. The worker
-- that took a job is the best for the next one as long as it has room: it had the least free CPUs that sufficed, and
-- has fewer now. So a run searches once. Its changes beside the jobs' own keys are written at its end (`end_run`),
-- before anything else looks there, or once it is as long as a command may be.

-- End a run: write its changes.
--
-- A run has `shape`, `amounts`, `looked` (workers at which this script has looked), and `full` where all later jobs are
-- filed. Until they are written it has `book` and the admissions there: `tokens` (id, token, id, token, ...), `due`
-- (time, id, time, id, ...) and `messages`. It also has `waiting`, as `file` takes it, with `first`, the least of its
-- orders.
local function end_run(run)
  if run.messages then
    enter(run.book, {})
    redis.call('HSET', KEY.held .. run.book.worker, unpack(run.tokens))
    redis.call('ZADD', KEY.unclaimed, unpack(run.due))
    redis.call('LPUSH', run.book.queue, unpack(run.messages))
    count('admitted', #run.messages)
    run.messages = nil
  end
  if run.waiting then
    file(run.shape, run.waiting, run.first)
    count('filed', #run.waiting / 2)
    run.waiting = nil
  end
end

-- Find the best worker for a run. Returns its book, or nil and the cursor behind which there may be others. One script
-- looks at LIMIT.searched workers. After that it looks at none, and the caller goes on from the beginning.
local function search(run, epoch, now)
  if run.looked >= LIMIT.searched then
    return nil, '0', ''
  end
  local index = index_for(run.amounts)
  local least, looked_at, last = int(run.amounts.cpus or 0), 0, nil
  -- The first few are nearly always enough. The others are fetched only when they are needed.
  for _, size in ipairs({LIMIT.few, LIMIT.candidates - LIMIT.few}) do
    local found = redis.call('ZRANGEBYSCORE', index, least, '+inf', 'LIMIT', looked_at, size)
    local book = first_with_room(index, found, epoch, now, run.shape, run.amounts)
    if book then
      run.looked = run.looked + #found
      return book
    end
    looked_at, run.looked = looked_at + #found, run.looked + #found
    if #found < size then
      break
    end
    last = found[#found]
  end
  if looked_at == LIMIT.candidates then
    return nil, redis.call('ZSCORE', index, last), last
  end
  return nil, '', ''
end
