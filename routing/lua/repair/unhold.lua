#!lua flags=allow-oom
-- Does: takes out of the list of a worker the entries of which no job's own key speaks, of those that are named.
-- KEYS: none; by name: epoch, held, job
-- ARGV: epoch, run_id, worker, then the ids of the entries
-- Replies: {ok, entries taken out} | {cold} | {epoch, current}
-- Cost: two or three commands an entry
-- Repeat: harmless
local epoch, run_id, worker = ARGV[1], ARGV[2], ARGV[3]

local no = refused(epoch, run_id)
if no then
  return no
end
local taken = 0
for i = 4, #ARGV do
  local token = redis.call('HGET', KEY.held .. worker, ARGV[i])
  if token and not shape_of_held(worker, ARGV[i], token) then
    taken = taken + redis.call('HDEL', KEY.held .. worker, ARGV[i])
  end
end
return {'ok', int(taken)}
