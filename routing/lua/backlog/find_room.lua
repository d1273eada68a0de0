#!lua flags=allow-oom
-- Does: looks for workers with room for the first jobs of waiting shapes, behind a cursor, and admits nothing.
-- KEYS: none; by name: epoch, shapes, free, free_of, book, kept, tasks, paused, tenants, used
-- ARGV: epoch, run_id, after (the order of the last shape looked at; '' to begin)
-- Replies: {ok, cursor ('' when done), then for each shape that may have room: shape, worker ('': not all workers were
--   looked at, or one is to be kept for its job)} | {cold} | {epoch, current}
-- Cost: at the worst LIMIT.shapes shapes are searched for, and LIMIT.searched books are read
-- Repeat: harmless: nothing is written
local now, looked, cursor = clock(), 0, ''
local from = after == '' and '-inf' or '(' .. after
local rows = redis.call('ZRANGEBYSCORE', KEY.shapes, from, '+inf', 'WITHSCORES', 'LIMIT', 0, LIMIT.shapes)
local reply = {'ok', ''}
for i = 1, #rows, 2 do
  local shape, book, seen, more = rows[i], nil, 0, nil
  local options = not is_paused(facts.paused, shape) and options_now(facts, shape)
  local startable = options and has_option(options)
  if startable then
    book, seen, more = search_any(shape, options, epoch, now, 2 * LIMIT.few, '', '')
  end
  looked, cursor = looked + seen, rows[i + 1]
  local to_keep = startable and amounts_of(shape).alone and not book and redis.call('HEXISTS', KEY.kept, shape) == 0
  if book or more or to_keep then
    reply[#reply + 1], reply[#reply + 2] = shape, book and book.worker or ''
  end
  if looked + 2 * LIMIT.few > LIMIT.searched then
    break
  end
end
reply[2] = (#rows == 2 * LIMIT.shapes or cursor ~= rows[#rows]) and cursor or ''
return reply
