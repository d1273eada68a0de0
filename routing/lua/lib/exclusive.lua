-- A worker that is kept for a job which must be alone.

-- End the keeping of a worker for a shape, because no job of that shape waits any more. Returns the worker, to be
-- filled.
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

-- True if another worker is kept for a shape. A worker that can no longer take the shape is no longer kept for it.
local function is_kept_elsewhere(shape, amounts, worker, epoch, now)
  local other = redis.call('HGET', KEY.kept, shape)
  local book = other and other ~= worker and read_book(other, epoch)
  if not book or book.kept ~= shape then
    return false
  end
  if book.status == 'ready' and book.lease > now and serves(book, shape) and fits_empty(book, amounts)
    and knows(book.tasks, shape) then
    return true
  end
  redis.call('HDEL', KEY.book .. other, 'kept')
  book.kept = nil
  write_book(book, {})
  return false
end
