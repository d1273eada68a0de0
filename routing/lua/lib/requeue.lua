-- A job leaves its worker: it ends with a tombstone, or goes back into the backlog.

-- Leave a tombstone of a job whose attempt is over, or that ended in the backlog. `job` has the entry that says so. The
-- tombstone stays until Postgres has that entry, however long it takes. From then on `ack_transitions` lets it expire.
local function bury(id, job, became, outcome, final)
  write_job(id, {state = 'ended', entry = job.entry, noted = job.entry and job.noted, epoch = job.epoch,
    attempt = job.attempt, became = became, outcome = outcome, final = final and '1' or nil},
    not job.entry and LIMIT.tombstone)
end

-- Put a job that held an allocation back into the backlog; the caller gives the allocation back. A job that was revoked
-- meanwhile, or lost too often, ends instead. A lost job ends with its outbox, and with `told`, which says if its
-- worker tells the end. Returns the new state of the job.
local function put_back(id, job, now, outcome, error_text, most_losses, outbox, told)
  redis.call('HDEL', KEY.held .. job.worker, id)
  redis.call('ZREM', KEY.unclaimed, id)
  if job.counted then
    give_use_back(job, now)
  end
  if outcome == 'lost' then
    job.losses = int(tonumber(job.losses or '0') + 1)
    count('lost', 1)
  end
  if job.revoked then
    note(id, job, 'cancelled', STEP.back, now, {outcome = outcome, error = 'revoked'})
    bury(id, job, 'cancelled', outcome, true)
    return 'cancelled'
  end
  if outcome == 'lost' then
    -- A successor that the attempt published before it was lost still runs.
    if (job.rerun == '0' or tonumber(job.losses) >= tonumber(most_losses)) and not job.successor then
      note(id, job, 'lost', STEP.ended, now, {outcome = 'lost', error = error_text, outbox = outbox, told = told})
      bury(id, job, 'lost', 'lost', true)
      return 'lost'
    end
    job.shape = shape_held(job.shape, job.losses, most_losses)
  end
  job.shape = holding(job.shape, 0)
  if job.successor or message_of(id, job) == '' then
    -- Postgres has the message that runs next: that of the successor, or that of an adopted job.
    local state = job.successor and 'scheduled' or 'accepted'
    note(id, job, state, STEP.back, now, {outcome = outcome, error = error_text})
    bury(id, job, state, outcome, false)
    return state
  end
  note(id, job, 'waiting', STEP.back, now, {outcome = outcome, error = error_text})
  job.state, job.worker, job.incarnation, job.admitted, job.started = 'waiting', nil, nil, nil, nil
  job.nonce, job.redelivered = nil, nil
  write_job(id, job)
  file(job.shape, {job.order, id}, job.order)
  return 'waiting'
end
