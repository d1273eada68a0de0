-- Shared by the scripts of the ledger, as prelude.lua is. Here: what a worker holds, whether it is kept, and the pass that
-- fills it.

-- The shape of an entry of a worker's list, nil for an entry of which no job's own key speaks.
local function shape_of_held(worker, id, token)
  local job = redis.call('HMGET', KEY.job .. id, 'state', 'epoch', 'attempt', 'worker', 'shape')
  local held = (job[1] == 'admitted' or job[1] == 'running') and job[4] == worker and job[2] .. '.' .. job[3] == token
  return held and job[5] or nil
end

-- What a worker holds: the sum of the amounts, and the entries of its list of which no job's own key speaks. nil where the
-- list has more than LIMIT.held entries: the caller then counts them in pages, and gives the sum (`counted`, as a shape).
local function sum_held(worker, counted)
  if counted ~= '' then
    return amounts_of(counted), {}
  end
  if redis.call('HLEN', KEY.held .. worker) > LIMIT.held then
    return nil
  end
  local sums, strays = {}, {}
  local held = redis.call('HGETALL', KEY.held .. worker)
  for i = 1, #held, 2 do
    local shape = shape_of_held(worker, held[i], held[i + 1])
    for name, amount in pairs(shape and amounts_of(shape) or {}) do
      sums[name] = (sums[name] or 0) + amount
    end
    if not shape then
      strays[#strays + 1] = held[i]
    end
  end
  return sums, strays
end

-- Nobody waits under a shape any more: the worker that was kept for it is so no longer. Returns it, to be filled.
local function unkeep(shape, epoch)
  local worker = redis.call('HGET', KEY.kept, shape)
  if not worker then
    return nil
  end
  redis.call('HDEL', KEY.kept, shape)
  if redis.call('HGET', KEY.book .. worker, 'kept') ~= shape then
    return nil
  end
  redis.call('HDEL', KEY.book .. worker, 'kept')
  local book = read_book(worker, epoch)
  if book then
    write_book(book, {})
  end
  return worker
end

-- Is another worker kept for a shape? One that cannot take it any more is kept no longer.
local function is_kept_elsewhere(shape, amounts, worker, epoch, now)
  local other = redis.call('HGET', KEY.kept, shape)
  local book = other and other ~= worker and read_book(other, epoch)
  if not book or book.kept ~= shape then
    return false
  end
  if book.status == 'ready' and book.lease > now and serves(book, shape) and fits_empty(book, amounts) then
    return true
  end
  redis.call('HDEL', KEY.book .. other, 'kept')
  book.kept = nil
  write_book(book, {})
  return false
end

-- The shapes behind an order that a worker may take, by the indexes of what it has, LIMIT.shapes of them at the most:
-- shape, order, shape, order, ... (Each index is read a few at a time: there may be a hundred of them.)
local function shapes_behind(book, order)
  local lists = {}
  for _, name in ipairs(resources_of(book)) do
    lists[#lists + 1] = {key = KEY.shapes_of .. name}
  end
  if not book.capacity['queue:'] then
    lists[#lists + 1] = {key = KEY.shapes_of .. LIMIT.unlabelled}
  end
  local size = math.max(LIMIT.few, math.ceil(LIMIT.shapes / #lists))
  local function step(list)
    list.at = (list.at or 2 * size - 1) + 2
    if list.at > 2 * size then
      list.rows = redis.call('ZRANGEBYSCORE', list.key, '(' .. order, '+inf', 'WITHSCORES', 'LIMIT', list.seen or 0, size)
      list.seen, list.at = (list.seen or 0) + size, 1
    end
    list.order = tonumber(list.rows[list.at + 1])
  end
  for _, list in ipairs(lists) do
    step(list)
  end
  local found = {}
  while #found < 2 * LIMIT.shapes do
    local first
    for _, list in ipairs(lists) do
      if list.order and (not first or list.order < first.order) then
        first = list
      end
    end
    if not first then
      break
    end
    found[#found + 1], found[#found + 2] = first.rows[first.at], first.rows[first.at + 1]
    step(first)
  end
  return found
end

-- One pass of `fill` over one worker. Returns also a worker that was kept until now for a job that went to this one.
local function fill_one(worker, epoch, now, after, nonce, out, given)
  local book = given
  if given then
    if not is_open(given) and not given.kept then
      return 0, ''
    end
  else
    if not redis.call('ZSCORE', KEY.free, worker) and not redis.call('HGET', KEY.book .. worker, 'kept') then
      return 0, ''
    end
    book = read_book(worker, epoch)
  end
  if not book or book.lease <= now or book.status ~= 'ready' or over(book) then
    return 0, ''
  end
  local found
  if book.kept then
    local kept, head = book.kept, redis.call('ZSCORE', KEY.shapes, book.kept)
    local mine = redis.call('HGET', KEY.kept, kept) == worker
    if mine and head and serves(book, kept) and fits_empty(book, amounts_of(kept)) then
      if (book.allocated.slots or 0) > 0 then
        return 0, ''
      end
      found = {kept, head}
    end
    if mine then
      redis.call('HDEL', KEY.kept, kept)
    end
    redis.call('HDEL', KEY.book .. worker, 'kept')
    book.kept = nil
    write_book(book, {})
  end
  if room(book, 'slots') < 1 or (book.allocated.alone or 0) > 0 then
    return 0, ''
  end
  local first_page, second_page, cursor = found or {}, {}, ''
  if not found and after == '' then
    first_page = redis.call('ZRANGE', KEY.shapes, 0, LIMIT.shapes - 1, 'WITHSCORES')
  end
  -- Behind these stand perhaps a thousand that ask for what this worker does not have.
  if not found and (after ~= '' or #first_page == 2 * LIMIT.shapes) then
    second_page = shapes_behind(book, after == '' and first_page[#first_page] or after)
  end
  if #second_page == 2 * LIMIT.shapes then
    cursor = second_page[#second_page]
  end
  -- Candidates in order of their first jobs; a shape that does not fit now cannot fit later in this pass.
  local candidates = {}
  for _, page in ipairs({first_page, second_page}) do
    for i = 1, #page, 2 do
      local amounts = serves(book, page[i]) and amounts_of(page[i])
      if amounts and (fits(book, amounts) or (amounts.alone and fits_empty(book, amounts))) then
        candidates[#candidates + 1] = {shape = page[i], order = tonumber(page[i + 1]), amounts = amounts}
      end
    end
  end
  local admitted, dead, freed = 0, 0, nil
  while #candidates > 0 do
    local first = table.remove(candidates, 1)
    local alone, occupied = first.amounts.alone, admitted > 0 or (book.allocated.slots or 0) > 0
    -- Its turn has come, and others run here: the worker is kept for it, unless another one is.
    local keep = alone and occupied and not is_kept_elsewhere(first.shape, first.amounts, worker, epoch, now)
    if keep or (not (alone and occupied) and fits(book, first.amounts)) then
      -- (A place without its waiting job costs as much as one with it.)
      if admitted + dead == LIMIT.most then
        cursor = after == '' and '-inf' or after
        break
      end
      if keep then
        redis.call('HSET', KEY.kept, first.shape, worker)
        redis.call('HSET', KEY.book .. worker, 'kept', first.shape)
        book.kept, cursor = first.shape, ''
        break
      end
      local id = redis.call('ZPOPMIN', KEY.wait .. first.shape)[1]
      local job = id and read_job(id)
      local message = job and job.state == 'waiting' and redis.call('HGET', KEY.job .. id, 'message')
      if message then
        job.epoch, job.attempt = epoch, int(tonumber(job.attempt) + 1)
        if nonce and #message <= LIMIT.hand_over then
          hand_over(id, job, message, book, now, nonce, out)
        else
          grant(id, job, message, book, now)
        end
        admitted = admitted + 1
        allocate(book, first.amounts, 1)
      elseif id then
        dead = dead + 1
      end
      local order = refile(first.shape)
      if alone then
        freed = not order and unkeep(first.shape, epoch) or nil
        if admitted > 0 then
          break
        end
      end
      if order then
        first.order = order
        local place = #candidates + 1
        for i, other in ipairs(candidates) do
          if order < other.order then
            place = i
            break
          end
        end
        table.insert(candidates, place, first)
      end
    end
  end
  if dead > 0 then
    count('drift', dead)
  end
  if admitted > 0 then
    write_book(book, {})
    count('admitted', admitted)
  elseif book.kept then
    write_book(book, {})
  end
  return admitted, cursor, freed
end

-- Fill a worker that was kept until now, and whoever is kept no more by that. Nobody hears of a cursor here, so it takes
-- LIMIT.passes at once: it is empty, or nearly, and after the first one nothing ends there that would go on. What is left
-- after LIMIT.freed passes over all of them is for their heartbeats.
local function fill_freed(worker, epoch, now)
  local freed, left = {worker}, LIMIT.freed
  while #freed > 0 and left > 0 do
    local other, cursor = table.remove(freed), ''
    for _ = 1, math.min(LIMIT.passes, left) do
      left = left - 1
      local _, on, too = fill_one(other, epoch, now, cursor == '-inf' and '' or cursor)
      cursor = on
      freed[#freed + 1] = too
      if cursor == '' then
        break
      end
    end
  end
end

-- Admit to one worker what now fits on it, in order, looking at the first LIMIT.shapes shapes and as many behind these
-- that it may take (after a cursor only at such), and admitting LIMIT.most jobs at the most. Returns the number admitted
-- and the cursor to go on with, '' when done. With a nonce the worker itself is asking: what is not large is handed over in
-- `out`, without the way by the broker. Whoever changed its book gives it with what is not written yet, to be written here.
local function fill(worker, epoch, now, after, nonce, out, book)
  local admitted, cursor, freed = fill_one(worker, epoch, now, after, nonce, out, book)
  if book and next(book.unwritten) then
    write_book(book, {})
  end
  if freed then
    fill_freed(freed, epoch, now)
  end
  return admitted, cursor
end

-- After a job left the queue of a shape, otherwise than by `fill`. Returns a worker that was kept until now, to be filled.
local function leave_queue(shape, epoch)
  if refile(shape) or not string.find(shape, 'alone=', 1, true) then
    return nil
  end
  return unkeep(shape, epoch)
end
