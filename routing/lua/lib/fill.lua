-- Passes that fill a worker, and the workers that are no longer kept because of them.

-- Fill a worker that is no longer kept, and all workers that are no longer kept because of that. Nobody goes on from a
-- cursor here, so each worker gets LIMIT.passes at once. The worker is empty, or nearly: after the first pass no job
-- ends there whose release would go on. After LIMIT.freed passes over all workers, their heartbeats do the rest.
local function fill_freed(worker, epoch, now)
  local freed, left = {worker}, LIMIT.freed
  while #freed > 0 and left > 0 do
    local other, cursor = table.remove(freed), ''
    for _ = 1, math.min(LIMIT.passes, left) do
      left = left - 1
      local _, on, too = fill_pass(other, epoch, now, cursor == '-inf' and '' or cursor)
      cursor = on
      freed[#freed + 1] = too
      if cursor == '' then
        break
      end
    end
  end
end

-- Admit to one worker the waiting jobs that now fit on it, in their order. A call looks at the first LIMIT.shapes
-- shapes, and at as many behind them that the worker may take. After a cursor it looks only at the latter. It admits no
-- more than LIMIT.most jobs. Returns the number admitted and the cursor to go on from, '' when done. With a nonce the
-- worker itself is asking: jobs whose messages are not large are handed over in `out`, past the broker. A caller that
-- changed the book passes it with its unwritten changes, which are written here.
local function fill(worker, epoch, now, after, nonce, out, book)
  local admitted, cursor, freed = fill_pass(worker, epoch, now, after, nonce, out, book)
  if book and next(book.unwritten) then
    write_book(book, {})
  end
  if freed then
    fill_freed(freed, epoch, now)
  end
  return admitted, cursor
end

-- Update the place of a shape after a job left its queue other than by `fill`. Returns a worker that was kept until
-- now, to be filled.
local function leave_queue(shape, epoch)
  if refile(shape) or not string.find(shape, 'alone=', 1, true) then
    return nil
  end
  return unkeep(shape, epoch)
end
