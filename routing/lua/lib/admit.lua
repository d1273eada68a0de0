-- Admission of a job to a worker.

-- Write that a job is admitted to a worker. `job` has epoch, attempt (the new one), shape, order, losses, submitted and
-- its message. It is `counted` while tenants are in use.
local function note_admission(id, job, book, now)
  if job.counted then
    count_use(job.shape, 1)
  end
  job.state, job.worker, job.incarnation = 'admitted', book.worker, book.incarnation
  job.admitted = int(now)
  if job.started then
    job.started = nil
  end
  note(id, job, 'admitted', STEP.admitted, now)
  write_job(id, job)
end

-- Admit a job to a worker and deliver its message, in this atomic step. The caller has checked that the job fits, and
-- writes the book.
local function admit_job(id, job, message, book, now)
  note_admission(id, job, book, now)
  redis.call('HSET', KEY.held .. book.worker, id, token_of(job))
  redis.call('ZADD', KEY.unclaimed, int(now + LIMIT.start), id)
  redis.call('LPUSH', book.queue, tagged(message, id, job))
end

-- Append a job with its lease to a reply, as `replies.hand_overs` reads it.
local function append_handed_over(reply, id, job, message)
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] = id, token_of(job), job.admitted, job.started
  reply[n + 5], reply[n + 6], reply[n + 7] = job.entry or '', job.losses or '0', job.shape
  reply[n + 8], reply[n + 9], reply[n + 10] = job.rerun or '', job.submitted or '', tagged(message, id, job)
end

-- Admit a job to the worker that is asking, and give it the lease at once. The message goes into the reply (`out`), so
-- neither a way through the broker nor a claim is needed. Where the reply is lost, `hand_over_again` returns
-- the job.
local function hand_over(id, job, message, book, now, nonce, out)
  if job.counted then
    count_use(job.shape, 1)
  end
  job.state, job.worker, job.incarnation, job.nonce = 'running', book.worker, book.incarnation, nonce
  job.admitted, job.started = int(now), int(now)
  note(id, job, 'running', STEP.running, now)
  write_job(id, job)
  redis.call('HSET', KEY.held .. book.worker, id, token_of(job))
  append_handed_over(out, id, job, message)
end

-- The function by which a pass starts a job: it hands the job over to the worker that asks with a nonce, and admits
-- it where nobody asks or its message is large.
local function way_to_start(book, now, nonce, out)
  return function(id, job, message)
    if nonce ~= '' and #message <= LIMIT.hand_over then
      hand_over(id, job, message, book, now, nonce, out)
    else
      admit_job(id, job, message, book, now)
    end
  end
end
