-- Admission of a job to a worker.

-- Write that a job is admitted to a worker. `job` has epoch, attempt (the new one), shape, order, losses, submitted and
-- entry. A new job also has the fields that are written only once (`first`).
local function note_admission(id, job, message, book, now)
  job.state, job.worker, job.incarnation = 'admitted', book.worker, book.incarnation
  job.admitted, job.started = int(now), nil
  note(id, job, 'admitted', STEP.admitted, now)
  redis.call('HSET', KEY.job .. id, 'state', 'admitted', 'epoch', job.epoch, 'attempt', job.attempt,
    'worker', book.worker, 'incarnation', book.incarnation, 'shape', job.shape, 'order', job.order,
    'admitted', job.admitted, 'losses', job.losses or '0', 'submitted', job.submitted or '0',
    'entry', job.entry, 'noted', job.noted, 'message', message, unpack(job.first or {}))
end

-- Admit a job to a worker and deliver its message, in this atomic step. The caller has checked that the job fits, and
-- writes the book.
local function admit_job(id, job, message, book, now)
  note_admission(id, job, message, book, now)
  redis.call('HSET', KEY.held .. book.worker, id, token_of(job))
  redis.call('ZADD', KEY.unclaimed, int(now + LIMIT.start), id)
  redis.call('LPUSH', book.queue, tagged(message, id, job))
end

-- Admit a job to the worker that is asking, and give it the lease at once. The message goes into the reply (`out`), so
-- neither a way through the broker nor a claim is needed. Where the reply is lost, `hand_over_again` returns
-- the job.
local function hand_over(id, job, message, book, now, nonce, out)
  job.state, job.worker, job.incarnation = 'running', book.worker, book.incarnation
  job.admitted, job.started = int(now), int(now)
  note(id, job, 'running', STEP.running, now)
  redis.call('HSET', KEY.job .. id, 'state', 'running', 'epoch', job.epoch, 'attempt', job.attempt,
    'worker', book.worker, 'incarnation', book.incarnation, 'shape', job.shape, 'order', job.order,
    'admitted', job.admitted, 'started', job.started, 'nonce', nonce, 'losses', job.losses or '0',
    'entry', job.entry, 'noted', job.noted)
  redis.call('HSET', KEY.held .. book.worker, id, token_of(job))
  local n = #out
  out[n + 1], out[n + 2], out[n + 3], out[n + 4] = id, token_of(job), job.admitted, job.started
  out[n + 5], out[n + 6], out[n + 7], out[n + 8] = job.entry, job.losses or '0', job.shape, job.rerun or ''
  out[n + 9] = tagged(message, id, job)
end
