#!lua flags=allow-oom
-- Does: enters the jobs that a worker holds since an older epoch into the books of a new epoch.
-- KEYS: none; by name: epoch, book, job, held, wait, shapes, shapes_of, asks, counters, stream, free, free_of, view,
--   allocated, allocated_cpus, kept, border, low, tenant_heads, used
-- ARGV: epoch, run_id, worker, incarnation, then for each job: job, token, shape, order, admitted (ms), started (ms),
--   nonce, losses, rerun (0: its first lost attempt ends it)
-- Replies: {ok, freed (a worker that was kept for one of them, and is to be filled; '': none), then for each job:
--   adopted | stale} | {unknown} | {cold} | {epoch, current}
-- Cost: at most thirteen commands a job
-- Repeat: harmless: a job that the worker holds already is answered 'adopted'
local book = read_book(worker, epoch)
if not book or book.incarnation ~= incarnation then
  return {'unknown'}
end
local reply, left = {'ok', ''}, {}
for i = EACH.first, #ARGV, EACH.step do
  local id, token, shape, order = ARGV[i + EACH.job], ARGV[i + EACH.token], ARGV[i + EACH.shape], ARGV[i + EACH.order]
  local admitted, started, nonce = ARGV[i + EACH.admitted], ARGV[i + EACH.started], ARGV[i + EACH.nonce]
  local losses, rerun = ARGV[i + EACH.losses], ARGV[i + EACH.rerun]
  local token_epoch, token_attempt = string.match(token, '^(%d+)%.(%d+)$')
  local job = read_job(id)
  local verdict = 'adopted'
  if job and job.state == 'waiting' and tonumber(job.attempt) < tonumber(token_attempt) then
    -- The backlog was read before this claim reached Postgres.
    unqueue(job.shape, id)
    left[#left + 1] = job.shape
    if job.entry then
      redis.call('XDEL', KEY.stream, job.entry)
    end
    job = nil
  end
  if job and job.state == 'ended' and not job.final and tonumber(job.attempt) < tonumber(token_attempt) then
    job = nil
  end
  if not job then
    local counted = has_tenants(facts, shape) and '1' or nil
    write_job(id, {state = 'running', counted = counted, epoch = token_epoch, attempt = token_attempt, worker = worker,
      incarnation = incarnation, shape = shape, order = order, admitted = admitted, started = started, nonce = nonce,
      losses = losses, rerun = rerun == '0' and rerun or nil})
    -- 0: the job stood there already, and only its own key was lost.
    if redis.call('HSET', KEY.held .. worker, id, token) == 1 then
      allocate(book, amounts_of(shape), 1)
      if counted then
        count_use(shape, 1)
      end
    end
    count('adopted', 1)
  elseif token_of(job) ~= token or job.incarnation ~= incarnation or job.state == 'ended' then
    verdict = 'stale'
    count('stale.adopt', 1)
  elseif redis.call('HSET', KEY.held .. worker, id, token) == 1 then
    -- The job's place in the list was lost, perhaps with the book. The book then does not count the job.
    allocate(book, amounts_of(job.shape), 1)
  end
  reply[#reply + 1] = verdict
end
write_book(book)
if over(book) then
  redis.call('HSET', KEY.book .. worker, 'shrunk', '1')
end
for _, shape in ipairs(left) do
  -- Of several workers that are no longer kept, which is rarer still, the caller fills only one. The others are filled
  -- with their heartbeats.
  local freed = leave_queue(shape, epoch, facts)
  reply[2] = freed ~= '' and freed or reply[2]
end
return reply
