-- Passes that fill a worker, and those that are kept no more by them.

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
