#!lua flags=allow-oom
-- Does: looks for a worker for the first waiting job of a shape, among the candidates after a cursor, and admits it.
-- KEYS: none; by name: epoch, job, shapes, shapes_of, asks, free, free_of, book, wait, counters, stream, held,
--   unclaimed, view, allocated, allocated_cpus, kept, tasks, border, low, paused, tenant_heads, tenants, used
-- ARGV: epoch, run_id, shape, cursor_score, cursor_worker (both '' to begin)
-- Replies: {admitted, job, worker, attempt, freed (a worker that was kept for this shape, and is to be filled; '':
--   none)} | {more, cursor_score, cursor_worker, freed} | {none, freed} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.candidates books are read, and LIMIT.most places without their waiting jobs are passed
-- Repeat: harmless: the admitted job waits no longer, and the next one is looked at
local now, id = clock(), first_of(shape)
local options = id and not is_paused(facts.paused, shape) and options_now(facts, shape)
if not options or not has_option(options) then
  return {'none', ''}
end
local book, _, cpus, worker, number = search_any(shape, options, epoch, now, LIMIT.candidates, cursor_score,
  cursor_worker)
if not book then
  return cpus and {'more', cpus, worker, ''} or {'none', ''}
end
-- No more than LIMIT.most places without their waiting jobs are passed in one step.
for _ = 1, LIMIT.most do
  unqueue(shape, id)
  local job = read_job(id, true)
  if job and job.state == 'waiting' and job.message ~= '' then
    job.epoch, job.attempt, job.counted = epoch, int(tonumber(job.attempt) + 1), facts.tenants and '1' or nil
    job.shape = holding(shape, number)
    admit_job(id, job, job.message, book, now)
    allocate(book, options[number], 1)
    enter(book)
    count('admitted', 1)
    return {'admitted', id, book.worker, job.attempt, leave_queue(shape, epoch, facts)}
  end
  count('drift', 1)
  id = first_of(shape)
  if not id then
    return {'none', leave_queue(shape, epoch, facts)}
  end
end
return {'more', cursor_score, cursor_worker, leave_queue(shape, epoch, facts)}
