#!lua flags=allow-oom
-- Does: gives back the allocations of attempts that are over, stores their results, and admits to that worker the jobs
--   that now fit.
-- KEYS: none; by name: epoch, book, job, held, unclaimed, counters, stream, wait, shapes, shapes_of, asks, free,
--   free_of, view, allocated, allocated_cpus, kept, tasks, border, low, paused, withheld, past, tenant_heads, tenants,
--   totals, used
-- ARGV: epoch, run_id, worker, incarnation, most_losses, admit (1: go on to admit, 0: this caller may not), nonce (not
--   '': the worker is asking, so hand jobs over to it), then for each job: job, token, outcome (succeeded, failed,
--   cancelled, expired, replaced, retried, requeued, handed_back, lost), error, outbox, told (1: the worker tells how
--   the job ended), results (number of those kept in this Redis), and for each of these: key (of Celery's backend),
--   seconds (to live; 0: for ever), result
-- Replies: {ok, cursor (of shapes), freed (a worker to be filled too, '': none), unheld (shapes that a quota held back
--   until now, a line each), then for each job: released | repeat | stale | unknown (the job has no key), state, entry,
--   shape, then for each job handed over: job, token, admitted, started, entry, losses, shape, rerun, submitted,
--   message} | {cold} | {epoch, current}
-- Cost: at most fifteen commands a job and two a result, a pass like that of fill, a command for each index of free
--   CPUs in which the worker stands, and for each tenant with a quota two commands and one for each resource in it
-- Repeat: harmless: keyed by job and token; the repeated end of an attempt that ended its job is answered 'repeat', any
--   other end 'stale'
local now = clock()
local book = read_book(worker, epoch)
if not book then
  -- The book went missing, and with it the list of held jobs. The worker registers anew, and reports the ended attempts
  -- again.
  return {'cold'}
end
local mine = book.incarnation == incarnation
local any, ended = false, {}
local reply = {'ok', '', '', ''}
local i = EACH.first
while i <= #ARGV do
  local id, token, outcome = ARGV[i + EACH.job], ARGV[i + EACH.token], ARGV[i + EACH.outcome]
  local error_text, outbox, told = ARGV[i + EACH.error], ARGV[i + EACH.outbox], ARGV[i + EACH.told]
  local results = i + EACH.step
  i = results + INNER.step * tonumber(ARGV[i + EACH.results])
  local job = read_job(id)
  local verdict, state, entry = 'stale', '', ''
  if job and job.state == 'ended' and token_of(job) == token and job.outcome == outcome then
    verdict, state, entry = 'repeat', job.became, job.entry or ''
  elseif mine and job and token_of(job) == token and job.incarnation == incarnation
      and (job.state == 'admitted' or job.state == 'running') then
    verdict, any = 'released', true
    if job.counted then
      local of_tenant = ended[tenant_of(job.shape)] or {shape = job.shape, amounts = {}}
      for name, amount in pairs(amounts_of(job.shape)) do
        of_tenant.amounts[name] = (of_tenant.amounts[name] or 0) + amount
      end
      ended[tenant_of(job.shape)] = of_tenant
    end
    allocate(book, amounts_of(job.shape), -1)
    if outcome == 'handed_back' or outcome == 'lost' then
      if outcome == 'handed_back' then
        count('handed_back', 1)
      end
      state = put_back(id, job, now, outcome, error_text, most_losses, outbox, told)
    else
      local final = outcome ~= 'retried' and outcome ~= 'requeued'
      state = final and outcome or 'scheduled'
      redis.call('HDEL', KEY.held .. worker, id)
      if job.counted then
        give_use_back(job, now)
      end
      if job.state == 'admitted' then
        redis.call('ZREM', KEY.unclaimed, id)
      end
      note(id, job, state, final and STEP.ended or STEP.back, now, {outcome = outcome, error = error_text,
        outbox = outbox, told = told})
      -- Where Postgres holds a successor, or waits for a replacement, the job goes on, unless it was revoked.
      local for_good = final and outcome ~= 'replaced' and (outcome == 'cancelled' or not job.successor)
      bury(id, job, state, outcome, for_good)
    end
    entry = job.entry
    -- A job that runs again has no result, unless its attempt itself says that it is retried.
    if outcome ~= 'handed_back' and (outcome ~= 'lost' or state == 'lost') then
      for r = results, i - 1, INNER.step do
        -- Store the result as Celery's backend does, and publish it to its waiting clients.
        local key, seconds, result = ARGV[r + INNER.key], ARGV[r + INNER.seconds], ARGV[r + INNER.result]
        local kept = redis.pcall('SET', key, result, unpack(seconds == '0' and {} or {'EX', seconds}))
        local sent = redis.pcall('PUBLISH', key, result)
        -- These commands fail for an expiry that no key can have, or without the right to that channel. The book is not
        -- written yet, so no error here may end this script.
        if (type(kept) == 'table' and kept.err) or (type(sent) == 'table' and sent.err) then
          count('refused.result', 1)
        end
      end
    end
  elseif mine and not job then
    verdict = 'unknown'
  else
    count('stale.release', 1)
  end
  reply[#reply + 1] = verdict
  reply[#reply + 1] = state
  reply[#reply + 1] = entry
  reply[#reply + 1] = job and job.shape or ''
end
if any and admit == '1' and (book.kept or book.unfilled or is_waiting(facts)) then
  -- Behind a backlog of wide jobs nearly every release frees too little, and a pass would parse shapes to find that.
  if book.kept or book.unfilled or may_fit(book) then
    local _
    _, reply[2], reply[3] = fill_pass(book, now, '-inf', facts, way_to_start(book, now, nonce, reply))
  end
  local unheld = {}
  for _, of_tenant in pairs(ended) do
    for _, shape in ipairs(shapes_below_quota(facts, of_tenant.shape, of_tenant.amounts)) do
      unheld[#unheld + 1] = shape
    end
  end
  reply[4] = table.concat(unheld, '\n')
elseif any and admit ~= '1' then
  redis.call('HSET', KEY.book .. worker, 'unfilled', '1')
end
if next(book.unwritten) then
  write_book(book)
end
return reply
