#!lua flags=allow-oom
-- Does: repairs the queue of a shape for one job, and the indexes of shapes for the first job of the shape.
-- KEYS: none; by name: epoch, job, wait, shapes, shapes_of
-- ARGV: epoch, run_id, shape, job ('' when only the shape is looked at), seen (the resource in whose index the shape
--   was seen; '': none)
-- Replies: {ok, differed (1, else 0)} | {cold} | {epoch, current}
-- Cost: constant
-- Repeat: harmless
local epoch, run_id, shape, id, seen = ARG.epoch, ARG.run_id, ARG.shape, ARG.job, ARG.seen

local no = refused(epoch, run_id)
if no then
  return no
end
local different = 0
if id ~= '' then
  local job = read_job(id)
  local belongs = job and job.state == 'waiting' and job.shape == shape
  local score = redis.call('ZSCORE', KEY.wait .. shape, id)
  if belongs and (not score or tonumber(score) ~= tonumber(job.order)) then
    redis.call('ZADD', KEY.wait .. shape, job.order, id)
    different = 1
  elseif score and not belongs then
    redis.call('ZREM', KEY.wait .. shape, id)
    different = 1
  end
end
local beside = shapes_beside(shape)
local before, before_beside = redis.call('ZSCORE', KEY.shapes, shape), redis.call('ZSCORE', beside, shape)
local after = refile(shape)
if (before and tonumber(before) or nil) ~= after or (before_beside and tonumber(before_beside) or nil) ~= after then
  different = 1
end
if seen ~= '' and KEY.shapes_of .. seen ~= beside and redis.call('ZREM', KEY.shapes_of .. seen, shape) == 1 then
  different = 1
end
return {'ok', int(different)}
