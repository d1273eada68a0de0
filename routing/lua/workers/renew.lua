#!lua flags=allow-oom
-- Does: renews the lease of a worker and its view, and says if jobs that fit there may have been left waiting. Once in
--   each ttl, and where anything is out of place, it writes the whole view and the places in the indexes anew.
-- KEYS: none; by name: epoch, book, held, missing, view, leases, free, free_of, allocated, allocated_cpus, asks, tasks
-- ARGV: epoch, run_id, worker, incarnation, ttl (ms), then for each field of the view: name, value
-- Replies: {ok, undone (1: the caller fills the worker, if it may admit), held (number of jobs), lacked (1 where
--   earlier lists lacked some of these jobs, else 0)} | {unknown} | {cold} | {epoch, current}
-- Cost: thirteen commands, or constant with two for each index of free CPUs in which the worker stands
-- Repeat: harmless
ttl = tonumber(ttl)
local now, key = clock(), KEY.book .. worker
local fields = redis.call('HMGET', key, 'epoch', 'lease', 'incarnation', 'queue', 'tasks', 'unfilled', 'kept',
  'lapsed', 'cordoned', 'a.slots', 'c.slots', 'status')
local lease, catalogue, status, unfilled = tonumber(fields[2]), fields[5], fields[12], fields[6]
-- A reserved book has no queue: its worker has to register.
if fields[1] ~= epoch or not lease or fields[3] ~= incarnation or fields[4] == '' then
  return {'unknown'}
end
-- A catalogue that is gone would keep all jobs from the worker: it registers again, with its tasks.
if catalogue and redis.call('PEXPIRE', KEY.tasks .. catalogue, LIMIT.catalogue) == 0 then
  return {'unknown'}
end
-- Whatever frees room or files a job fills it. That may be left undone: while nothing was admitted here, in a pass that
-- ended at a cursor, or where a worker is to be kept for a job that must be alone.
local undone = status == 'closed' or lease <= now or unfilled or fields[7]
-- A worker that the lapse closed, and that is alive after all, opens again.
if status == 'closed' then
  status = 'ready'
end
redis.call('ZADD', KEY.leases, int(now + ttl), worker)
local seen = redis.call('PEXPIRE', KEY.view .. worker, int(ttl)) == 1
local is_turn = math.floor(now / ttl) ~= math.floor(lease / ttl) - 1
-- A worker that takes no job now, such as one without a free slot, need not stand among the others.
local is_full = tonumber(fields[10] or 0) >= tonumber(fields[11] or 0)
local stands = fields[9] or is_full or status ~= 'ready' or redis.call('ZSCORE', KEY.free, worker)
if undone or fields[8] or is_turn or not seen or not stands then
  redis.call('HSET', key, 'lease', int(now + ttl), 'status', status)
  if fields[8] then
    redis.call('HDEL', key, 'lapsed')
  end
  local book, view = read_book(worker, epoch), {unpack(ARGV, EACH.first)}
  view[#view + 1], view[#view + 2] = 'status', status
  show(book, view)
  redis.call('PEXPIRE', KEY.view .. worker, int(ttl))
  choose_places(book)
  write_book(book)
  if undone and not unfilled then
    redis.call('HSET', key, 'unfilled', '1')
  end
else
  redis.call('HSET', key, 'lease', int(now + ttl))
  for i = EACH.first, #ARGV, EACH.step do
    if ARGV[i + EACH.name] == 'heartbeat_at' then
      redis.call('HSET', KEY.view .. worker, 'heartbeat_at', ARGV[i + EACH.value])
    end
  end
end
undone = undone or redis.call('ZCOUNT', KEY.asks .. 'cpus', '-inf', '(0') > 0
return {'ok', undone and '1' or '0', int(redis.call('HLEN', KEY.held .. worker)),
  int(redis.call('EXISTS', KEY.missing .. worker))}
