#!lua flags=allow-oom
-- Does: puts shapes that no pause holds back any more into the indexes of waiting shapes again.
-- KEYS: none; by name: epoch, paused, withheld, wait, border, low, shapes, shapes_of, asks, tenant_heads
-- ARGV: epoch, run_id, then for each shape (at most LIMIT.shapes): shape
-- Replies: {ok, resumed (number of shapes)} | {cold} | {epoch, current}
-- Cost: at most eighteen commands a shape
-- Repeat: harmless
local resumed = 0
for i = EACH.first, #ARGV, EACH.step do
  local shape = ARGV[i + EACH.shape]
  if not is_paused(facts.paused, shape) then
    resumed = resumed + redis.call('SREM', KEY.withheld, shape)
    if refile(shape) then
      note_asked(shape)
    end
  end
end
return {'ok', int(resumed)}
