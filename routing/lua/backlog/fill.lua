#!lua flags=allow-oom
-- Does: admits to one worker the waiting jobs that fit on it, going on after a cursor of shapes.
-- KEYS: none; by name: epoch, free, free_of, book, shapes, shapes_of, asks, wait, job, held, unclaimed, counters,
--   stream, view, allocated, allocated_cpus, kept, tasks, border, low, paused, withheld, past, tenant_heads, tenants,
--   totals, used
-- ARGV: epoch, run_id, worker, after (the cursor, -inf to begin)
-- Replies: {ok, admitted, cursor ('' when done), freed (a worker that was kept for an admitted job, and is to be filled
--   too; '': none)} | {cold} | {epoch, current}
-- Cost: at the worst twice LIMIT.shapes shapes are looked at, and LIMIT.most jobs are admitted, with at most fifteen
--   commands each
-- Repeat: harmless: an admitted job waits no longer
local book, now = read_book(worker, epoch), clock()
if not book then
  return {'ok', '0', '', ''}
end
local admitted, cursor, freed = fill_pass(book, now, after, facts, function(id, job, message)
  admit_job(id, job, message, book, now)
end)
return {'ok', int(admitted), cursor, freed}
