#!lua flags=allow-oom
-- Does: takes stray entries, which match no job's own key, out of the list of a worker. It looks only at the named
--   jobs.
-- KEYS: none; by name: epoch, held, job
-- ARGV: epoch, run_id, worker, then for each entry: job
-- Replies: {ok, taken (entries taken out of the list)} | {cold} | {epoch, current}
-- Cost: at most three commands an entry
-- Repeat: harmless
local taken = 0
for i = EACH.first, #ARGV, EACH.step do
  local token = redis.call('HGET', KEY.held .. worker, ARGV[i + EACH.job])
  if token and not shape_of_held(worker, ARGV[i + EACH.job], token) then
    taken = taken + redis.call('HDEL', KEY.held .. worker, ARGV[i + EACH.job])
  end
end
return {'ok', int(taken)}
