-- Reservations: a worker is kept for the first job of a shape, and others pass it only where they do not delay it. The
-- rules are those of routing/policy/reservation.py, by which the runner of the duties makes the reservations.

-- True if a worker is kept for a job that need not be alone.
local function is_reserved(book)
  return book.kept and not string.find(book.kept, 'alone=', 1, true)
end

-- Read the reservation of a worker into its book: the order of the first job, and the room beside it.
local function read_reservation(book, order)
  book.kept_order, book.beside_amounts = tonumber(order), amounts_of(book.beside or '')
end

-- True if a job of a shape that starts now ends before the reserved time.
local function ends_before(book, shape, now)
  local expected = expected_of(shape)
  return expected and now + expected <= tonumber(book.kept_at or '0')
end

-- True if a job comes before the reserved one in line, or is that one. Without `sharing`, orders alone are compared.
local function comes_first(book, shape, order, sharing)
  if not sharing then
    return order <= book.kept_order
  end
  local kept, turn = turn_of(sharing, tenant_of(book.kept)), turn_of(sharing, tenant_of(shape))
  return not comes_before(kept, book.kept_order, turn, order)
end

-- True if a job may start on a worker, as far as there is room.
local function passes(book, shape, order, amounts, now, sharing)
  if not book.kept or comes_first(book, shape, order, sharing) or ends_before(book, shape, now) then
    return true
  end
  for name, amount in pairs(amounts) do
    if (book.beside_amounts[name] or 0) < amount then
      return false
    end
  end
  return true
end

-- End the keeping of a worker, in its book and beside it.
local function forget_kept(book)
  redis.call('HDEL', KEY.book .. book.worker, 'kept', 'kept_at', 'kept_since', 'kept_order', 'beside')
  book.kept = nil
end

-- Note that a job starts on a reserved worker: the reserved one, or another with less room beside it from now on. After
-- the reserved one, the runner of the duties is to look at once: its pass of each second is late for short jobs.
local function note_start(book, shape, order, amounts, now)
  if shape == book.kept and order == book.kept_order then
    redis.call('HDEL', KEY.kept, shape)
    forget_kept(book)
    redis.call('PUBLISH', KEY.low, 'reserve')
  elseif not ends_before(book, shape, now) then
    local parts = {}
    for name, amount in pairs(book.beside_amounts) do
      local left = amount - (amounts[name] or 0)
      book.beside_amounts[name] = left
      if left > 0 then
        parts[#parts + 1] = name .. '=' .. int(left)
      end
    end
    redis.call('HSET', KEY.book .. book.worker, 'beside', table.concat(parts, ','))
  end
end

-- Note the workers that are reserved, with blanks between their names. Without any: ' ' where the first job that is
-- filed is to ask for a reservation, '  ' where it is not, '' where none is made at all.
local function note_reserved(workers)
  if workers == '' then
    redis.call('HDEL', KEY.epoch, 'reserved')
  else
    redis.call('HSET', KEY.epoch, 'reserved', workers)
  end
end

-- The number of the first of these alternatives by which a job may start on a worker now; nil for none.
local function first_option(book, shape, order, options, now, sharing)
  for number, amounts in ipairs(options) do
    if amounts and fits(book, amounts) and passes(book, shape, order, amounts, now, sharing) then
      return number
    end
  end
  return nil
end

-- True if a worker with free CPUs is a better fit for a shape than one with `other` free CPUs and an earlier name.
local function fits_better(shape, cpus, other)
  return (is_spread(shape) and cpus >= other) or (not is_spread(shape) and cpus < other)
end

-- The best fit among the reserved workers on which the first job of a shape may start now, '' for none: by its first
-- alternative that may start on any, as `find_worker`. Such workers stand in no index, so no search finds them. At most
-- LIMIT.candidates of them are looked at, by their names.
local function passing_worker(facts, shape, order, options, epoch, now)
  local looked, sharing, best, least, free = 0, nil, '', nil, nil
  for worker in string.gmatch(facts.reserved, '%S+') do
    looked = looked + 1
    local book = looked <= LIMIT.candidates and read_book(worker, epoch)
    if book and is_reserved(book) and book.kept ~= shape and book.lease > now and has_opening(book)
        and serves(book, shape) and fits_any(book, options) and takes(book, shape) then
      read_reservation(book, redis.call('ZSCORE', KEY.shapes, book.kept) or 'inf')
      sharing = sharing or open_sharing(facts)
      local number, cpus = first_option(book, shape, tonumber(order), options, now, sharing), room(book, 'cpus')
      if number and (not least or number < least or (number == least and fits_better(shape, cpus, free))) then
        best, least, free = book.worker, number, cpus
      end
    end
  end
  return best
end
