#!lua flags=allow-oom
-- Does: gives an incarnation of a worker the leases of the attempts whose messages arrived there. A message that
--   differs from the one that was pushed is refused, and the job's own message is delivered again.
-- KEYS: none; by name: epoch, book, job, unclaimed, counters, stream
-- ARGV: epoch, run_id, worker, incarnation, then for each job: job, token, nonce (unique to this claim), digest (of the
--   message that arrived; '': unknown, so not compared)
-- Replies: {ok, then for each job: claimed | stale | forged | unknown (no such job in this epoch), admitted, started,
--   entry, losses, rerun, revoked ('1': it was revoked, and the worker ends it), submitted} | {cold} | {epoch, current}
-- Cost: at most seven commands a job
-- Repeat: harmless: the nonce distinguishes a claim that is sent again from a second copy of the message
local now = clock()
local current = redis.call('HGET', KEY.book .. worker, 'incarnation') == incarnation
local reply = {'ok'}
for i = EACH.first, #ARGV, EACH.step do
  local id, token, nonce, digest = ARGV[i + EACH.job], ARGV[i + EACH.token], ARGV[i + EACH.nonce], ARGV[i + EACH.digest]
  local job = read_job(id)
  local mine = current and job and job.worker == worker and job.incarnation == incarnation and token_of(job) == token
  local verdict = 'stale'
  local pushed = digest ~= '' and mine and job.state == 'admitted' and job.digest
  if pushed and pushed ~= digest then
    verdict = 'forged'
    count('refused.forged', 1)
    redis.call('LPUSH', redis.call('HGET', KEY.book .. worker, 'queue'), tagged(message_of(id, job), id, job))
  elseif mine and job.state == 'admitted' then
    verdict = 'claimed'
    job.state, job.started, job.nonce = 'running', int(now), nonce
    note(id, job, 'running', STEP.running, now)
    write_job(id, job)
    redis.call('ZREM', KEY.unclaimed, id)
  elseif mine and job.state == 'running' and job.nonce == nonce then
    verdict = 'claimed'
  else
    if not job and string.match(token, '^%d+') == epoch then
      verdict = 'unknown'
    end
    count('stale.claim', 1)
  end
  reply[#reply + 1] = verdict
  reply[#reply + 1] = job and job.admitted or ''
  reply[#reply + 1] = job and job.started or ''
  reply[#reply + 1] = job and job.entry or ''
  reply[#reply + 1] = job and job.losses or '0'
  reply[#reply + 1] = job and job.rerun or ''
  reply[#reply + 1] = job and job.revoked or ''
  reply[#reply + 1] = job and job.submitted or ''
end
return reply
