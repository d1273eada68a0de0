-- Jobs that one script brings in, run by run.
--
-- Of those that one script brings, jobs of one shape that follow one another are a run. Where one of them finds no room,
-- none behind it does; and the worker that took one is the best for the next as long as it has room: it had the least that
-- sufficed, and has less now. So a run looks once, and what it changes beside the jobs' own keys is written at its end
-- (`end_run`), before anything else looks there, or when it is as long as a command may be.

-- A run has `shape`, `amounts`, `looked` (workers at which this script has looked), and `full` where all that follows is filed; until it is written, `book` with what was
-- admitted there: `tokens` (id, token, id, token, ...), `due` (time, id, time, id, ...) and `messages`; and `waiting` with
-- the least of its orders, `first`, as `file` takes them.
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

-- Look for the best worker for a run: its book, or nil and the cursor from which there may be others. One script looks at
-- LIMIT.searched workers: from then on nobody is looked at, and the caller looks on from the beginning.
local function search(run, epoch, now)
  if run.looked >= LIMIT.searched then
    return nil, '0', ''
  end
  local index = index_for(run.amounts)
  local least, looked_at, last = int(run.amounts.cpus or 0), 0, nil
  -- The first few are nearly always enough; the others are fetched only when they are needed.
  for _, size in ipairs({LIMIT.few, LIMIT.candidates - LIMIT.few}) do
    local found = redis.call('ZRANGEBYSCORE', index, least, '+inf', 'LIMIT', looked_at, size)
    local book = first_with_room(index, found, epoch, now, run.amounts)
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
