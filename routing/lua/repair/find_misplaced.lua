#!lua flags=allow-oom
-- Does: finds places in the queue of a shape that do not belong to waiting jobs of that shape.
-- KEYS: none; by name: epoch, job, wait
-- ARGV: epoch, run_id, shape, seen (places that were looked at, counted from the end), most (places to look at)
-- Replies: {ok, looked (number of places looked at), then for each job that does not belong there: job} | {cold}
--   | {epoch, current}
-- Cost: one command a place
-- Repeat: harmless: nothing is written
seen, most = tonumber(seen), tonumber(most)
-- Places are counted from the end, because jobs leave a queue at its front, which moves no place counted from the end.
-- The script `compare_jobs` asks each job that waits under this shape if it has the right place.
local places = redis.call('ZRANGE', KEY.wait .. shape, int(-seen - most), int(-seen - 1))
local reply = {'ok', int(#places)}
for _, id in ipairs(places) do
  local job = read_job(id)
  if not job or job.state ~= 'waiting' or job.shape ~= shape then
    reply[#reply + 1] = id
  end
end
return reply
