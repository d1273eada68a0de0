-- The shape for which a worker is kept, at the beginning of a pass.

-- Where a worker is kept for a job that must be alone: returns the row of that job's shape once the worker is empty, or
-- true while others run there. Where it is reserved for another job, it stays so. Else it ends the keeping.
local function kept_shape(book, sharing)
  local shape, head = book.kept, redis.call('ZSCORE', KEY.shapes, book.kept)
  local mine, row = redis.call('HGET', KEY.kept, shape) == book.worker, nil
  if mine and head and serves(book, shape) and takes(book, shape) and not is_paused(book.pauses, shape)
    and fits_any_empty(book, within_quota(sharing, shape, options_of(shape))) then
    if is_reserved(book) then
      read_reservation(book, head)
      return nil
    elseif (book.allocated.slots or 0) > 0 then
      return true
    end
    row = {shape, head}
  end
  if mine then
    redis.call('HDEL', KEY.kept, shape)
  end
  forget_kept(book)
  write_book(book)
  return row
end
