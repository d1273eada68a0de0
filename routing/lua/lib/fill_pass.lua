-- One pass that fills a worker.

-- Admit to one worker the waiting jobs that now fit on it, in their order, each by `admit(id, job, message)`. A pass
-- looks at the first LIMIT.shapes shapes, and at as many behind them that the worker may take. After a cursor it looks
-- only at the latter. It admits no more than LIMIT.most jobs. The caller writes changes of the book that are left
-- unwritten where no job is admitted. Returns the number admitted, and the cursor to go on from, '' when done. Also
-- returns a worker to be filled, '' for none: it was kept until now for a job that this worker took.
local function fill_pass(book, now, after, facts, admit)
  book.pauses = facts.paused
  local sharing = open_sharing(facts)
  local is_kept = book.kept and book.lease > now and book.status == 'ready' and not over(book)
  local kept_row = is_kept and kept_shape(book, sharing)
  if kept_row == true or not has_opening(book) or book.lease <= now or book.pauses == 'all' then
    -- A later release, or the heartbeat that opens the worker, fills it.
    if book.unfilled then
      redis.call('HDEL', KEY.book .. book.worker, 'unfilled')
    end
    return 0, '', ''
  end
  local tries = open_tries(book, kept_row, after, sharing)
  local admitted, dead, freed, cursor = 0, 0, '', ''
  while true do
    local first = next_of(tries, book)
    if not first then
      cursor = tries.more and tries.cursor or ''
      break
    end
    local alone, occupied = first.options[1].alone, admitted > 0 or (book.allocated.slots or 0) > 0
    local options = within_quota(sharing, first.shape, first.options)
    -- The turn of a job that must be alone has come, and others run here. The worker is kept for it, unless another is.
    local keep = alone and occupied and not book.kept and not is_kept_elsewhere(first.shape, options, book, now)
    local number = not (alone and occupied) and first_option(book, first.shape, first.order, options, now, sharing)
    if keep or number then
      -- A place without its waiting job costs as much as a place with it.
      if admitted + dead == LIMIT.most then
        cursor = after
        break
      end
      if keep then
        redis.call('HSET', KEY.kept, first.shape, book.worker)
        redis.call('HSET', KEY.book .. book.worker, 'kept', first.shape)
        book.kept = first.shape
        break
      end
      local id = redis.call('ZPOPMIN', KEY.wait .. first.shape)[1]
      local job = id and read_job(id, true)
      if job and job.state == 'waiting' and job.message ~= '' then
        job.epoch, job.attempt, job.counted = book.epoch, int(tonumber(job.attempt) + 1), sharing and '1' or nil
        job.shape = holding(first.shape, number)
        admit(id, job, job.message)
        admitted = admitted + 1
        allocate(book, options[number], 1)
        note_use(sharing, first.shape, options[number])
        if book.kept then
          note_start(book, first.shape, first.order, options[number], now)
        end
      elseif id then
        dead = dead + 1
      end
      local order = refile(first.shape)
      if book.kept == first.shape then
        -- The place at the head was without its waiting job.
        book.kept_order = order or math.huge
      elseif facts.reserved and not alone then
        freed = not order and unkeep(first.shape, book.epoch) or freed
      end
      if alone then
        freed = not order and unkeep(first.shape, book.epoch) or ''
        if admitted > 0 then
          break
        end
      end
      if order then
        first.order = order
        keep_shape(tries, first)
      end
      bring_back(tries, book, first.shape)
    elseif book.kept then
      set_back(tries, first)
    end
  end
  if admitted + dead > 0 then
    count_waiting(-admitted - dead)
  end
  if dead > 0 then
    count('drift', dead)
  end
  if admitted > 0 then
    count('admitted', admitted)
  end
  if admitted > 0 or book.kept then
    write_book(book)
  end
  if cursor ~= '' and not book.unfilled then
    redis.call('HSET', KEY.book .. book.worker, 'unfilled', '1')
  elseif cursor == '' and book.unfilled then
    redis.call('HDEL', KEY.book .. book.worker, 'unfilled')
  end
  return admitted, cursor, freed
end
