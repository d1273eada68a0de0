-- A worker that is kept for the first job of a shape.

-- End the keeping of a worker for a shape, because no job of that shape waits any more. Returns the worker, '' for
-- none. The caller of the script fills that worker. Where it dies before, the worker's next heartbeat does.
local function unkeep(shape, epoch)
  local worker = redis.call('HGET', KEY.kept, shape)
  if not worker then
    return ''
  end
  redis.call('HDEL', KEY.kept, shape)
  if redis.call('HGET', KEY.book .. worker, 'kept') ~= shape then
    return ''
  end
  redis.call('HDEL', KEY.book .. worker, 'kept', 'kept_at', 'kept_since', 'kept_order', 'beside')
  redis.call('HSET', KEY.book .. worker, 'unfilled', '1')
  local book = read_book(worker, epoch)
  if book then
    write_book(book)
  end
  return worker
end

-- Update the place of a shape after a job left its queue other than by a pass over a worker. Returns a worker that was
-- kept until now, '' for none, as `unkeep` does. `facts`: of `refused_or_facts`.
local function leave_queue(shape, epoch, facts)
  if refile(shape) or not (facts.reserved or string.find(shape, 'alone=', 1, true)) then
    return ''
  end
  return unkeep(shape, epoch)
end

-- True if another worker than the asking one is kept for a shape, or if none of these alternatives fits on the asking
-- one. A worker that can no longer take the shape is no longer kept for it.
local function is_kept_elsewhere(shape, options, asking, now)
  if not fits_any_empty(asking, options) then
    return true
  end
  local other = redis.call('HGET', KEY.kept, shape)
  local book = other and other ~= asking.worker and read_book(other, asking.epoch)
  if not book or book.kept ~= shape then
    return false
  end
  if book.status == 'ready' and not book.cordoned and book.lease > now and serves(book, shape)
    and fits_any_empty(book, options) and takes(book, shape) then
    return true
  end
  forget_kept(book)
  write_book(book)
  return false
end
