#!lua flags=allow-oom
-- Does: admits to one worker the waiting jobs that fit on it, going on after a cursor of shapes.
-- KEYS: none; by name: epoch, free, free_of, book, shapes, shapes_of, wait, job, held, unclaimed, counters, stream,
--   view, allocated, allocated_cpus, kept, tasks
-- ARGV: epoch, run_id, worker, cursor ('' to begin)
-- Replies: {ok, admitted, cursor ('' when done)} | {cold} | {epoch, current}
-- Cost: at the worst twice LIMIT.shapes shapes are looked at, and LIMIT.most jobs are admitted, with at most fifteen
--   commands each; LIMIT.freed such passes more where another worker was kept for an admitted job
-- Repeat: harmless: an admitted job waits no longer
local epoch, run_id, worker, after = ARG.epoch, ARG.run_id, ARG.worker, ARG.cursor

local no = refused(epoch, run_id)
if no then
  return no
end
local admitted, cursor = fill(worker, epoch, clock(), after == '-inf' and '' or after)
return {'ok', int(admitted), cursor}
