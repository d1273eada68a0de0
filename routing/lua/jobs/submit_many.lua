-- Does: admits or files many jobs whose rows are durable, in their order and in one step, each as submit does.
-- KEYS: none; by name: epoch, job, shapes, shapes_of, asks, free, free_of, book, wait, counters, stream, held,
--   unclaimed, view, allocated, allocated_cpus, carried, tasks, border, left, low, paused, withheld, tenant_heads,
--   past, tenants, totals, used
-- ARGV: epoch, run_id, deadline (ms of the server), then for each job: id, shape, order, message, attempt (admissions
--   so far), losses, submitted (ms), rerun (0: its first lost attempt ends it), digest (of the message)
-- Replies: {ok, taken, left (places of the jobs that stay in Postgres, with commas; the first is 0), passing (a
--   reserved worker that may take some and is to be filled; '': none), then for each shape that found no room among
--   those looked at, while there were others: shape, cursor_score, cursor_worker} | {late, now (ms)} | {cold} | {epoch,
--   current}
-- Cost: at most six commands a job, some twenty for each batch of jobs of one shape, and at the worst LIMIT.searched
--   books are read; a batch searches once, and again where a worker is full
-- Repeat: harmless: a job that is known, or has a tombstone, is left as it is
deadline = tonumber(deadline)
local now = clock()
if is_late(deadline, now, facts) then
  return {'late', int(now)}
end
local reply, taken, stay, place, batch = {'ok', '', '', ''}, 0, {}, 0, nil
for i = EACH.first, #ARGV, EACH.step do
  local id, shape, order = ARGV[i + EACH.id], ARGV[i + EACH.shape], ARGV[i + EACH.order]
  local message, attempt, losses = ARGV[i + EACH.message], ARGV[i + EACH.attempt], ARGV[i + EACH.losses]
  local submitted, rerun, digest = ARGV[i + EACH.submitted], ARGV[i + EACH.rerun], ARGV[i + EACH.digest]
  local job = {state = 'waiting', epoch = epoch, attempt = attempt, shape = shape, order = order, losses = losses,
    submitted = submitted, message = message, digest = digest}
  local became
  became, batch = admit_or_file(id, job, rerun, facts, now, batch)
  if became[1] == 'left' then
    stay[#stay + 1] = int(place)
  elseif became[1] ~= 'exists' then
    taken = taken + 1
  end
  place = place + 1
  if became[1] == 'waiting' and became[4] ~= '' then
    reply[4] = became[4]
  end
  if became[1] == 'waiting' and became[2] ~= '' then
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3] = shape, became[2], became[3]
  end
end
if batch then
  write_batch(batch)
end
reply[2], reply[3] = int(taken), table.concat(stay, ',')
return reply
