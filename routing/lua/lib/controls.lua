-- What operators hold back: cordons of workers, and pauses of the backlog (routing/store/controls.py).
--
-- `pauses` is the mark of the epoch that says if there is a pause: nil, '1', or 'all' for the whole platform. Without
-- one, nothing here sends a command.

-- True if a pause holds back the jobs of a shape: that of the platform, of their queue, task or tenant.
local function is_paused(pauses, shape)
  if not pauses or pauses == 'all' then
    return pauses == 'all'
  end
  local fields = redis.call('HMGET', KEY.paused, label_of(shape) or LIMIT.unlabelled, 'task:' .. (task_of(shape) or ''),
    'tenant:' .. tenant_of(shape))
  return (fields[1] or fields[2] or fields[3]) and true or false
end

-- True if a pause holds a shape back, which then leaves the indexes of waiting shapes. So later passes do not meet it
-- again. `resume_shapes` puts it back.
local function holds_back(pauses, shape)
  if not is_paused(pauses, shape) then
    return false
  end
  leave_indexes(shape)
  redis.call('SADD', KEY.withheld, shape)
  return true
end

-- The hash in which a control of a kind stands.
local function control_key(kind)
  return kind == 'cordon' and KEY.cordons or kind == 'tenant' and KEY.tenants or KEY.paused
end

-- Note in the epoch if there is a pause, and if there is a rule of a tenant. Tenants stay in use until the next epoch.
local function mark_controls()
  if redis.call('EXISTS', KEY.tenants) == 1 then
    redis.call('HSET', KEY.epoch, 'tenants', '1')
  end
  local pauses = redis.call('HEXISTS', KEY.paused, 'platform') == 1 and 'all'
    or redis.call('EXISTS', KEY.paused) == 1 and '1'
  if pauses then
    redis.call('HSET', KEY.epoch, 'paused', pauses)
  else
    redis.call('HDEL', KEY.epoch, 'paused')
  end
end

-- Enter the cordon of a worker into its book. A worker that was kept for a job takes it no more.
local function enter_cordon(book, status)
  local key = KEY.book .. book.worker
  book.cordoned = status
  if status then
    redis.call('HSET', key, 'cordoned', status)
    if book.kept then
      if redis.call('HGET', KEY.kept, book.kept) == book.worker then
        redis.call('HDEL', KEY.kept, book.kept)
      end
      forget_kept(book)
    end
  else
    redis.call('HDEL', key, 'cordoned')
    redis.call('HSET', key, 'unfilled', '1')
  end
  write_book(book)
end
