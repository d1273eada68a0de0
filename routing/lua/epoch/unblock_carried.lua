#!lua flags=allow-oom
-- Does: lets jobs in again that were carried over with their entries of an older epoch, because Postgres has these
--   entries now. Each job that no worker holds leaves a tombstone of the attempt that its row names. The
--   tombstone refuses a late submit that read the row before.
-- KEYS: none; by name: epoch, job, carried
-- ARGV: epoch, run_id, then for each job (at most 200): job, epoch, attempt, state (as its row has them), final (1: it
--   has ended, '': it goes on, held: a worker has it)
-- Replies: {ok, unblocked (jobs that were carried until now)} | {cold} | {epoch, current}
-- Cost: at most four commands a job
-- Repeat: harmless
local unblocked = 0
for i = EACH.first, #ARGV, EACH.step do
  local id, final = ARGV[i + EACH.job], ARGV[i + EACH.final]
  if redis.call('SREM', KEY.carried, id) == 1 then
    unblocked = unblocked + 1
    if final ~= 'held' and redis.call('EXISTS', KEY.job .. id) == 0 then
      write_job(id, {state = 'ended', epoch = ARGV[i + EACH.epoch], attempt = ARGV[i + EACH.attempt],
        became = ARGV[i + EACH.state], final = final == '1' and final or nil}, LIMIT.tombstone)
    end
  end
end
if redis.call('EXISTS', KEY.carried) == 0 then
  redis.call('HDEL', KEY.epoch, 'carries')
end
return {'ok', int(unblocked)}
