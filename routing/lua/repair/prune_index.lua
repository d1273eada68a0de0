#!lua flags=allow-oom
-- Does: takes workers whose books do not name the resource out of the index of a resource.
-- KEYS: none; by name: epoch, book, free_of
-- ARGV: epoch, run_id, resource, seen (places that were looked at and kept), most (places to look at)
-- Replies: {ok, looked (number of places looked at), taken (workers taken out of the index)} | {cold}
--   | {epoch, current}
-- Cost: at most two commands a place
-- Repeat: harmless
seen, most = tonumber(seen), tonumber(most)
local index, taken = KEY.free_of .. resource, 0
local workers = redis.call('ZRANGE', index, int(seen), int(seen + most - 1))
for _, worker in ipairs(workers) do
  local book = redis.call('HMGET', KEY.book .. worker, 'epoch', 'places')
  if book[1] ~= epoch or not string.find(',' .. (book[2] or '') .. ',', ',' .. resource .. ',', 1, true) then
    taken = taken + redis.call('ZREM', index, worker)
  end
end
return {'ok', int(#workers), int(taken)}
