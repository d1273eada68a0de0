-- Does: admits a job whose row is durable to the best worker and delivers it, or files it in the backlog.
-- KEYS: none; by name: epoch, job, shapes, shapes_of, asks, free, free_of, book, wait, counters, stream, held,
--   unclaimed, view, allocated, allocated_cpus, carried, tasks, border, left, low, paused, withheld, tenant_heads,
--   past, tenants, totals, used
-- ARGV: epoch, run_id, deadline (ms of the server), id, shape, order, message, attempt (admissions so far), losses,
--   submitted (ms), rerun (0: its first lost attempt ends it), digest (of the message)
-- Replies: {admitted, worker, attempt} | {waiting, cursor_score, cursor_worker ('' when all candidates were looked at),
--   passing (a reserved worker that may take it and is to be filled; '': none)} | {exists, state (of its key, or
--   carried)} | {left} (it stays in Postgres, and waits there) | {late, now (ms)} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.candidates books are read, and a command for each index of free CPUs in which the chosen
--   worker stands; independent of the number of workers and of waiting jobs
-- Repeat: harmless: a job that is known, or has a tombstone, is left as it is
deadline = tonumber(deadline)
local now = clock()
if is_late(deadline, now, facts) then
  return {'late', int(now)}
end
local job = {state = 'waiting', epoch = epoch, attempt = attempt, shape = shape, order = order, losses = losses,
  submitted = submitted, message = message, digest = digest}
local reply, batch = admit_or_file(id, job, rerun, facts, now)
if batch then
  write_batch(batch)
end
return reply
