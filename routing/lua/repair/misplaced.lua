#!lua flags=allow-oom
-- Does: finds places in the queue of a shape that no waiting job has.
-- KEYS: none; by name: epoch, job, wait
-- ARGV: epoch, run_id, shape, seen (places that were looked at, counted from the end), most (places to look at)
-- Replies: {ok, looked (at so many places), then for each job that does not belong there: job} | {cold} | {epoch, current}
-- Cost: one command a place
-- Repeat: harmless: nothing is written
local epoch, run_id, shape, seen, most = ARG.epoch, ARG.run_id, ARG.shape, tonumber(ARG.seen), tonumber(ARG.most)

local no = refused(epoch, run_id)
if no then
  return no
end
-- From the end: jobs leave a queue at its front, which moves no place that is counted from there. (Whether a job that
-- waits under this shape has the right place there is asked of each job.)
local places = redis.call('ZRANGE', KEY.wait .. shape, int(-seen - most), int(-seen - 1))
local reply = {'ok', int(#places)}
for _, id in ipairs(places) do
  local job = redis.call('HMGET', KEY.job .. id, 'state', 'shape')
  if job[1] ~= 'waiting' or job[2] ~= shape then
    reply[#reply + 1] = id
  end
end
return reply
