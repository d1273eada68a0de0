-- Numbers, times and texts, and the check that a caller is of this epoch.

-- A whole number as text: tostring() would write 1e+15, and %.0f takes three times as long.
local function int(number)
  return string.format('%d', number)
end

-- The server's clock in milliseconds. Clocks of clients are not trusted.
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Split the run_id of a caller: the server's run, and behind a slash the id of the caller's database in Postgres.
local function parted(run_id)
  return string.match(run_id, '^([^/]*)/?(.*)$')
end

-- The reply that refuses this caller, or nil where it may act on these books. `current`: the epoch, the server's run,
-- the format and the database of the books.
local function refusal(current, epoch, run_id)
  local server_run, database = parted(run_id)
  -- A process of an older release may not act on books of a newer format. The jobs that it accepted wait in Postgres
  -- for a process that knows the format. That process finds books of an older format cold, and opens them anew.
  if not current[1] or current[2] ~= server_run or tonumber(current[3] or 1) ~= LIMIT.format then
    return {'cold'}
  end
  if current[4] and database ~= '' and current[4] ~= database then
    return {'cold'}
  end
  if current[1] ~= epoch then
    return {'epoch', current[1]}
  end
  return nil
end

-- The reply that refuses this caller, or nil: for a script that needs no facts about the epoch.
local function refused(epoch, run_id)
  return refusal(redis.call('HMGET', KEY.epoch, 'epoch', 'run_id', 'format', 'database'), epoch, run_id)
end

-- The reply that refuses this caller, or nil and facts about the epoch: `opened` (ms), `carries` ('1': jobs are carried
-- over from an older one), `waiting` (jobs that wait here), `stay` ('1': others stay in Postgres), `tight` ('1': memory
-- is short), `paused` (lib/controls.lua), `reserved` (workers) and `asks` (lib/reservation.lua), `tenants`
-- (lib/tenants.lua).
local function refused_or_facts(epoch, run_id)
  -- The hash is short, and a field that is asked for by its name costs several times as much as one of a whole hash.
  local flat, facts = redis.call('HGETALL', KEY.epoch), {}
  for i = 1, #flat, 2 do
    facts[flat[i]] = flat[i + 1]
  end
  local no = refusal({facts.epoch, facts.run_id, facts.format, facts.database}, epoch, run_id)
  if no then
    return no
  end
  facts.waiting, facts.asks = tonumber(facts.waiting or 0), facts.reserved == ' '
  facts.reserved = string.find(facts.reserved or '', '%S') and facts.reserved
  return nil, facts
end

-- True if a name comes before another one by its bytes, as members of a sorted set stand.
local function is_before(name, other)
  local at = 1
  while at <= #name and string.byte(name, at) == string.byte(other, at) do
    at = at + 1
  end
  return (string.byte(name, at) or -1) < (string.byte(other, at) or -1)
end

local function count(what, by)
  redis.call('HINCRBY', KEY.counters, what, by)
end

-- "cpus=4000,slots=1" as {cpus = 4000, slots = 1}.
local function amounts_of(shape)
  local amounts, at = {}, 1
  while true do
    -- An anchored match does not try each place of the task's name, at which no amount begins.
    local name, amount, behind = string.match(shape, '^([^=,]+)=(%d+),?()', at)
    if not name then
      return amounts
    end
    amounts[name], at = tonumber(amount), behind
  end
end

-- Millicores as people read them: 72000 -> 72, 500 -> 0.5.
local function cpus_text(millicores)
  if millicores % 1000 == 0 then
    return int(millicores / 1000)
  end
  local text = string.format('%.3f', millicores / 1000)
  text = string.gsub(text, '0+$', '')
  return (string.gsub(text, '%.$', ''))
end
