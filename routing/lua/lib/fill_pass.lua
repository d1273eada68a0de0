-- One pass that fills a worker.

-- Make a pass of `fill` over one worker. Also returns a worker that was kept until now for a job that this worker took.
local function fill_pass(worker, epoch, now, after, nonce, out, passed)
  local book = passed
  if passed then
    if not is_open(passed) and not passed.kept then
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
  local kept_row
  if book.kept then
    local kept, head = book.kept, redis.call('ZSCORE', KEY.shapes, book.kept)
    local mine = redis.call('HGET', KEY.kept, kept) == worker
    if mine and head and serves(book, kept) and fits_empty(book, amounts_of(kept)) and knows(book.tasks, kept) then
      if (book.allocated.slots or 0) > 0 then
        return 0, ''
      end
      kept_row = {kept, head}
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
  local shapes, cursor = shapes_to_try(book, kept_row, after)
  local admitted, dead, freed = 0, 0, nil
  while #shapes > 0 do
    local first = table.remove(shapes, 1)
    local alone, occupied = first.amounts.alone, admitted > 0 or (book.allocated.slots or 0) > 0
    -- The turn of a job that must be alone has come, and others run here. The worker is kept for it, unless another
    -- worker is.
    local keep = alone and occupied and not is_kept_elsewhere(first.shape, first.amounts, worker, epoch, now)
    if keep or (not (alone and occupied) and fits(book, first.amounts)) then
      -- A place without its waiting job costs as much as a place with it.
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
          admit_job(id, job, message, book, now)
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
        local place = #shapes + 1
        for i, other in ipairs(shapes) do
          if order < other.order then
            place = i
            break
          end
        end
        table.insert(shapes, place, first)
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
