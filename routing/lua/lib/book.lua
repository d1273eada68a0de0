-- The book of a worker, and the checks of its free amounts.

-- A worker's whole book, with `left` ms until its end; nil where it is missing or of another epoch (COLD, never 0).
local function read_book(worker, epoch)
  local flat = redis.call('HGETALL', KEY.book .. worker)
  local book = {worker = worker, capacity = {alone = 1}, allocated = {}, unwritten = {}}
  for i = 1, #flat, 2 do
    local field, value = flat[i], flat[i + 1]
    local kind = string.sub(field, 1, 2)
    if kind == 'c.' then
      book.capacity[string.sub(field, 3)] = tonumber(value)
    elseif kind == 'a.' then
      book.allocated[string.sub(field, 3)] = tonumber(value)
    else
      book[field] = value
    end
  end
  if book.epoch ~= epoch or not book.lease then
    return nil
  end
  book.lease, book.left = tonumber(book.lease), book.ends and book.ends - clock()
  return book
end

-- Ask for a comparison with Postgres where a worker without a book has a lease: the book went missing, and the sum of
-- CPUs still counts it. The name is that of a duty (`SUSPICION` in workers/runner/duty_runner.py).
local function note_lost_book(worker)
  if redis.call('ZSCORE', KEY.leases, worker) then
    redis.call('SADD', KEY.asked, 'suspicion')
  end
end

local function room(book, name)
  return (book.capacity[name] or 0) - (book.allocated[name] or 0)
end

-- The label of the queue that a shape asks for, nil for the default queue.
local function label_of(shape)
  return string.find(shape, 'queue:', 1, true) and string.match(shape, '(queue:[^=,]+)=')
end

-- The task of a shape, which stands between its amounts and its suffix; nil where any worker may take the job.
local function task_of(shape)
  return string.match(shape, ',([^=,|?+$^~]+)$') or string.match(shape, ',([^=,|?+$^~]+),[|?+$^~]')
end

-- Store the names of a catalogue's tasks, once for all workers with the same ones. An empty name, which no task has,
-- keeps the set of a worker without tasks.
local function keep_catalogue(catalogue, names)
  local key = KEY.tasks .. catalogue
  if redis.call('EXISTS', key) == 0 then
    local some = {''}
    for name in string.gmatch(names, '%S+') do
      some[#some + 1] = name
      if #some == LIMIT.batch then
        redis.call('SADD', key, unpack(some))
        some = {''}
      end
    end
    redis.call('SADD', key, unpack(some))
  end
  redis.call('PEXPIRE', key, LIMIT.catalogue)
end

-- True if a worker with this catalogue of tasks has registered the task of a shape. A shape without a task is for every
-- worker, and a worker without a catalogue, of an older release, takes every task.
local function knows(catalogue, shape)
  local task = catalogue and task_of(shape)
  return not task or redis.call('SISMEMBER', KEY.tasks .. catalogue, task) == 1
end

-- True if a worker takes jobs of this shape's queue. A worker that does not serve the default queue takes only jobs
-- with a label.
local function serves(book, shape)
  local label = label_of(shape)
  if label then
    return (book.capacity[label] or 0) > 0
  end
  return not book.capacity['queue:']
end

-- True if the whole vector fits into the free amounts.
local function fits(book, amounts)
  for name, amount in pairs(amounts) do
    if room(book, name) < amount then
      return false
    end
  end
  return true
end

-- True if the whole vector would fit on the worker with nothing allocated there.
local function fits_empty(book, amounts)
  for name, amount in pairs(amounts) do
    if (book.capacity[name] or 0) < amount then
      return false
    end
  end
  return true
end

-- True if more is allocated than there is, in any resource. Nothing is admitted until it fits again. Queues do not
-- count.
local function over(book)
  for name, amount in pairs(book.allocated) do
    if amount > (book.capacity[name] or 0) and string.sub(name, 1, 6) ~= 'queue:' then
      return true
    end
  end
  return false
end

-- Allocate amounts on a book so many times (-1: give them back). The caller writes the book once, after all changes of
-- its script.
local function allocate(book, amounts, times)
  for name, amount in pairs(amounts) do
    book.allocated[name] = (book.allocated[name] or 0) + times * amount
    book.unwritten[name] = (book.unwritten[name] or 0) + times * amount
  end
end
