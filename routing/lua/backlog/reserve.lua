#!lua flags=allow-oom
-- Does: reserves a worker for the first waiting job of a shape, or renews its reservation, as the caller has judged.
-- KEYS: none; by name: epoch, book, tasks, shapes, paused, kept, free, free_of, view, allocated, allocated_cpus
-- ARGV: epoch, run_id, worker, shape, order (that of the job), at (ms: when the job is expected to start there; 0: the
--   worker is kept until then), since (ms: from when on it is kept; 0: it is not), beside (amounts that later jobs may
--   hold at that time, as a shape), seen (allocated amounts by which the caller judged, as a shape), reserved (all
--   workers that are reserved from now on, with blanks between)
-- Replies: {ok} | {changed} (the job, the worker or its allocations are others by now, and nothing is written) | {cold}
--   | {epoch, current}
-- Cost: constant, and two commands for each index of free CPUs in which the worker stands
-- Repeat: harmless
local book, head = read_book(worker, epoch), redis.call('ZSCORE', KEY.shapes, shape)
if not book or book.status ~= 'ready' or book.cordoned or book.lease <= clock() or not takes(book, shape)
    or not head or int(tonumber(head)) ~= order or is_paused(facts.paused, shape)
    or (book.kept and not is_reserved(book)) then
  return {'changed'}
end
local allocated = amounts_of(seen)
for name, amount in pairs(book.allocated) do
  if amount ~= (allocated[name] or 0) then
    return {'changed'}
  end
end
local other = redis.call('HGET', KEY.kept, shape)
if other and other ~= worker then
  return {'changed'}
end
if book.kept and book.kept ~= shape then
  redis.call('HDEL', KEY.kept, book.kept)
end
note_reserved(reserved)
redis.call('HSET', KEY.kept, shape, worker)
redis.call('HSET', KEY.book .. worker, 'kept', shape, 'kept_at', at, 'kept_since', since, 'kept_order', order, 'beside',
  beside)
book.kept = shape
write_book(book)
return {'ok'}
