-- Batches of jobs that one script brings in.
--
-- A batch holds consecutive jobs of one shape. Where one job of a batch finds no room, no later one does. The worker
-- that took a job is the best for the next one as long as it has room: it had the least free CPUs that sufficed, and
-- has fewer now. So a batch searches once. Its changes beside the jobs' own keys are written by `write_batch` at its
-- end: before anything else looks there, or once it is as long as a command may be.

-- Write the changes of a batch, at its end.
--
-- A batch has `shape`, `options` (its alternatives), and `looked` (workers at which this script has looked). `number`,
-- `amounts`: of the alternative that its last job took. It has `full` where all later jobs are filed. `paused`: a pause
-- holds the shape back. Until they are written it has `book` and the admissions there: `tokens` (id, token, id, token,
-- ...), `due` (time, id, time, id, ...) and `messages`. It also has `waiting`, as `file` takes it, with `first`, the
-- least of its orders.
local function write_batch(batch)
  if batch.messages then
    enter(batch.book)
    redis.call('HSET', KEY.held .. batch.book.worker, unpack(batch.tokens))
    redis.call('ZADD', KEY.unclaimed, unpack(batch.due))
    redis.call('LPUSH', batch.book.queue, unpack(batch.messages))
    count('admitted', #batch.messages)
    batch.messages = nil
  end
  if batch.waiting then
    file(batch.shape, batch.waiting, batch.first, batch.paused)
    count('filed', #batch.waiting / 2)
    batch.waiting = nil
  end
end

-- True if a job of a batch that finds no room is to stay in Postgres, because the head of the backlog is full. Every
-- shape may have LIMIT.least jobs here. `facts` are those of `refused_or_facts`.
local function is_beyond(batch, facts)
  if not facts.tight and (LIMIT.backlog == 0 or facts.waiting < LIMIT.backlog) then
    return false
  end
  batch.here = batch.here or redis.call('ZCARD', KEY.wait .. batch.shape) + #(batch.waiting or '') / 2
  return batch.here >= LIMIT.least
end

-- Leave a job in Postgres: note the border of its shape. The runner of the duties forgets `left` before it reads the
-- rows that stay there, so `left` has the least order of the jobs that it may not have read. The empty message
-- has listeners look again, since the ledger notes no transition here; one is enough for a call.
local function leave_behind(id, batch, order, facts)
  redis.call('ZADD', KEY.left, 'LT', order, batch.shape)
  count('left', 1)
  if not facts.announced then
    facts.announced = redis.call('PUBLISH', KEY.job .. id, '')
  end
  if batch.border and tonumber(order) >= tonumber(batch.border) then
    return
  end
  write_batch(batch)
  redis.call('ZADD', KEY.border, 'LT', order, batch.shape)
  batch.border, facts.stay = order, '1'
  redis.call('HSET', KEY.epoch, 'stay', '1')
  -- Jobs here that come behind it wait until it was fetched.
  refile(batch.shape)
end

-- Search for a worker for the first of these alternatives for which any has room, as `search` does for one. Also
-- returns the number of the alternative. The cursor of a later one has its number before the free CPUs: 2/4000.
local function search_any(shape, options, epoch, now, most, cursor_cpus, cursor_worker)
  local looked, from, behind = 0, string.match(cursor_cpus, '^(%d+)/(.*)$')
  local cpus, worker = behind or cursor_cpus, cursor_worker
  for number = tonumber(from or '1'), #options do
    if looked >= most then
      return nil, looked, int(number) .. '/', ''
    elseif options[number] then
      local book, seen, more, last = search(shape, options[number], epoch, now, most - looked, cpus, worker)
      looked = looked + seen
      if book or more then
        return book, looked, more and (number > 1 and int(number) .. '/' or '') .. more, last, number
      end
    end
    cpus, worker = '', ''
  end
  return nil, looked
end

-- Find the best worker for a batch, for one of these alternatives. Returns its book, or nil and the cursor behind which
-- there may be others. One script looks at LIMIT.searched workers. After that it looks at none, and the caller goes on
-- from the beginning.
local function find_worker(batch, options, epoch, now)
  if batch.looked >= LIMIT.searched then
    return nil, '0', ''
  end
  local book, looked, cpus, worker, number = search_any(batch.shape, options, epoch, now, LIMIT.candidates, '', '')
  batch.looked, batch.number, batch.amounts = batch.looked + looked, number, number and options[number]
  return book, cpus or '', worker or ''
end
