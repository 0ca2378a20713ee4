-- Slots of limits, of which a lock of runs is one. Those who have one: `:LOCKED` (a hash of job ids), `:HANDS` (a sorted set
-- of tokens, by hand, and until when they are good), or of a rate `:STARTS` (by the time of their start). `:WANTS`: who asks by
-- hand, and until when that counts. Who waits: `barnabas:waiting:` (job ids by age), `barnabas:parked:` (id -> its score in the
-- schedule, when it is due, queue, limit, payload); `barnabas:turns:`: whose turn it is, until when. `barnabas:crowd:`:
-- whether to look for any who wait, have a turn, or ask by hand. All by the server's clock.
local function clock()
  local t = redis.call('TIME')
  return t[1] + t[2] / 1e6
end

local function slots(text) -- "key,count,span,", and "!" if its jobs do not wait
  local name, most, span, mode = string.match(text, '^([^,]*),(%d+),([^,]*),(!?)$')
  return {text = text, name = name, most = tonumber(most), span = tonumber(span), waits = mode == '',
    locked = prefix .. name .. ':LOCKED', crowd = prefix .. 'barnabas:crowd:' .. name}
end

-- Keep what is known of those who want a slot for so many seconds.
local function lasts(need, name, seconds)
  if redis.call('TTL', need.crowd) < seconds then redis.call('SET', need.crowd, '1', 'EX', seconds) end
  redis.call('EXPIRE', name, seconds)
end

-- How many of these keys there are; what stands in these fields of a hash.
local function present(keys)
  local count = 0
  for first = 1, #keys, 1000 do count = count + redis.call('EXISTS', unpack(keys, first, math.min(first + 999, #keys))) end
  return count
end

local function fetched(name, fields)
  local found = {}
  for first = 1, #fields, 1000 do
    local some = redis.call('HMGET', name, unpack(fields, first, math.min(first + 999, #fields)))
    for i = 1, #some do found[#found + 1] = some[i] end
  end
  return found
end

local function nth(place, at) -- the time of the nth last
  return tonumber(redis.call('ZREVRANGE', place, at - 1, at - 1, 'WITHSCORES')[2])
end

local function promised(need, now, jid)
  local turns, count = key('barnabas:turns:' .. need.name), 0
  if redis.call('EXISTS', turns) == 1 then
    redis.call('ZREMRANGEBYSCORE', turns, '-inf', now)
    count = redis.call('ZCARD', turns)
    if count > 0 and jid and redis.call('ZSCORE', turns, jid) then count = count - 1 end
  end
  return count
end

-- Whether fewer than `most` have a slot; since when the last of so many has had it.
local function vacant(need, most, now)
  if most < 1 then return false end
  if need.span > 0 then
    local oldest = nth(key(need.name .. ':STARTS'), most)
    return not oldest or oldest + need.span <= now
  end
  local count = redis.call('HLEN', need.locked)
  if count < most then count = count + redis.call('ZCOUNT', key(need.name .. ':HANDS'), now, '+inf') end
  return count < most
end

local function wants(need, now)
  return redis.call('ZCOUNT', key(need.name .. ':WANTS'), now, '+inf')
end

-- Those who wait first for free slots go to the front of their queues, and it is their turn for 10 s.
local function wake(need, now)
  local waiting, parked = key('barnabas:waiting:' .. need.name), key('barnabas:parked:' .. need.name)
  if not fits(key('schedule'), 'zset') then return end
  while vacant(need, need.most - promised(need, now) - wants(need, now), now) do
    local jid = redis.call('ZPOPMIN', waiting)[1]
    if not jid then return end
    local at, name, payload = string.match(redis.call('HGET', parked, jid) or '', '^(%S+) %S+ (%S+) %S+ (.*)$')
    redis.call('HDEL', parked, jid)
    local score = payload and redis.call('ZSCORE', key('schedule'), payload)
    local there = score and tonumber(score) == tonumber(at) -- else somebody has given it another time, or deleted it
    there = there and fits(key('queue:' .. name), 'list') -- else it comes when it is due
    if there then
      redis.call('ZREM', key('schedule'), payload)
      redis.pcall('SADD', key('queues'), name)
      redis.call('RPUSH', key('queue:' .. name), payload)
    end
    there = there or (at and not score and tonumber(at) <= now) -- (it may be on its way already)
    if there and redis.call('SISMEMBER', key('paused'), name) == 0 then -- else others need not wait for it
      redis.call('ZADD', key('barnabas:turns:' .. need.name), now + 10, jid)
      lasts(need, key('barnabas:turns:' .. need.name), 60)
    end
  end
end

-- These runs of a process have. `how`: they have not begun ("back"), or maybe they have ("front"), and their jobs are in front of
-- their queues again, so it is still their turn. What they had is forgotten last: an error before that, and it is done again.
local function ended(id, how, numbers)
  local mine, now, over, waiting = key('barnabas:running:' .. id), clock(), {}, {}
  for i, said in ipairs(fetched(mine, numbers)) do
    local needs, jid = string.match(said or '', '^([^\n]*)\n(.*)$')
    for text in string.gmatch(needs or '', '%S+') do
      local need = slots(text)
      if need.span == 0 then
        redis.call('HDEL', need.locked, jid)
        if how == 'back' or how == 'front' then
          redis.call('ZADD', key('barnabas:turns:' .. need.name), now + 10, jid)
          lasts(need, key('barnabas:turns:' .. need.name), 60)
        end
        over[#over + 1], waiting[#waiting + 1] = need, prefix .. 'barnabas:waiting:' .. need.name
      elseif how == 'back' then
        redis.call('ZREM', key(need.name .. ':STARTS'), id .. '/' .. numbers[i])
      end
    end
  end
  if present(waiting) > 0 then
    for _, need in ipairs(over) do wake(need, now) end
  end
  packed('HDEL', mine, numbers)
end

-- Take a slot of each.
local function occupy(needs, now, who, lead)
  for _, need in ipairs(needs) do
    if need.span > 0 then
      local place = key(need.name .. ':STARTS')
      local oldest, at = nth(place, need.most), now
      if oldest and oldest + need.span <= now and oldest + need.span > now - math.min(1, math.max(0.25, need.span / 11)) / 4 then
        at = oldest + need.span
      end
      redis.call('ZADD', place, at, lead .. who)
      redis.call('ZREMRANGEBYSCORE', place, '-inf', now - need.span - 2)
      redis.call('EXPIRE', place, math.ceil(need.span) + 60)
    end
  end
end

-- When somebody may look again who finds no slot. `before`: when the last of those ahead is due, who may be late: so their number
-- counts as well, or many who are late would all come again at once, and be late for it.
local function turn_of(need, now, before, ahead)
  local base, apart = now + 60, 0.01
  if need.span > 0 then
    local oldest = nth(key(need.name .. ':STARTS'), need.most)
    base, apart = oldest and oldest + need.span or now + 0.1, need.span / need.most
    base = math.max(base, now + 0.01) + math.floor((ahead or 0) / need.most) * need.span
  else
    local hand = tonumber(redis.call('ZRANGEBYSCORE', key(need.name .. ':HANDS'), now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2])
    if hand then base = math.min(base, hand + 0.1) end -- its process may die
  end
  return before and math.max(base, before + apart) or base
end

-- Those who wait first look anew: behind somebody who takes no slot. Whether there are any.
local function hasten(need, now)
  local waiting, parked, any = key('barnabas:waiting:' .. need.name), key('barnabas:parked:' .. need.name), false
  for _, jid in ipairs(redis.call('ZRANGE', waiting, 0, 99)) do
    local at, rest, payload = string.match(redis.call('HGET', parked, jid) or '', '^(%S+) %S+( %S+ %S+ (.*))$')
    local score = at and redis.call('ZSCORE', key('schedule'), payload)
    if score and tonumber(score) == tonumber(at) and tonumber(at) > now then
      redis.call('ZADD', key('schedule'), string.format('%.6f', now), payload)
      redis.call('HSET', parked, jid, string.format('%.6f %.6f', now, now) .. rest)
      any = true
    end
  end
  return any
end

--- admit
-- Of each claimed job of a queue that needs slots, or gives a lock back: 1 if it may begin; 0 if it waits, or is not in this
-- process's hands any more; else the id of the job that is at work. And when the first of those that wait is due.
local id, name, jobs, fields, numbers, signs, vain = arg(), arg(), {}, {}, {}, {}, {}
for i = 1, number() do
  local job = {arg(), arg(), arg(), arg(), {}}
  for n = 1, number() do
    job[5][n] = slots(arg())
    signs[#signs + 1] = job[5][n].crowd
  end
  jobs[i], numbers[i], fields[i] = job, job[1], job[1] .. ':' .. name
end
local work, mine, now, answers, soonest = key('barnabas:work:' .. id), key('barnabas:running:' .. id), clock(), {}, ''
local held, known, calm = fetched(work, fields), fetched(mine, numbers), present(signs) == 0

-- Whether there is no slot, and if so behind whom it waits, how much too early it comes, by its own time, and behind how many.
-- Mostly nobody waits, has a turn, or asks by hand.
local function crowded(need, jid, created)
  if calm or redis.call('EXISTS', need.crowd) == 0 then
    local taken = need.span == 0 and redis.call('HLEN', need.locked)
    if taken then return taken >= need.most or (taken > 0 and redis.call('HEXISTS', need.locked, jid) == 1), nil, 0 end
    return not vacant(need, need.most, now), nil, 0
  end
  local waiting, parked = key('barnabas:waiting:' .. need.name), key('barnabas:parked:' .. need.name)
  local ahead, before, early = 0, nil, 0
  if redis.call('EXISTS', waiting) == 1 then
    if redis.call('ZREM', waiting, jid) == 1 then
      local at = tonumber(string.match(redis.call('HGET', parked, jid) or '', '^%S+'))
      redis.call('HDEL', parked, jid)
      early = at and at > now + 0.005 and need.span > 0 and at - now or 0
    end
    while true do -- of those who were due long ago and did not come, nothing is known
      local first = redis.call('ZRANGE', waiting, 0, 0)[1]
      local due = first and tonumber(string.match(redis.call('HGET', parked, first) or '', '^%S+') or 0)
      if not first or due + 30 > now then break end
      redis.call('ZREM', waiting, first)
      redis.call('HDEL', parked, first)
    end
    ahead = redis.call('ZCOUNT', waiting, '-inf', '(' .. created)
    if ahead > 0 then
      local last = redis.call('ZREVRANGEBYSCORE', waiting, '(' .. created, '-inf', 'LIMIT', 0, 1)[1]
      before = tonumber(string.match(redis.call('HGET', parked, last) or '', '^%S+ (%S+)'))
    end
  end
  local left = need.most - ahead - promised(need, now, jid)
  if left > 0 then left = left - wants(need, now) end
  local twin = need.span == 0 and redis.call('HEXISTS', need.locked, jid) == 1
  return twin or not vacant(need, left, now), before, early, ahead
end

for i, job in ipairs(jobs) do
  local sequence, jid, lock, created, needs = unpack(job)
  local payload, answer = held[i], 1
  if not payload then
    answer = 0
  elseif #needs > 0 and not known[i] then
    local full, before, early, ahead, of
    for _, need in ipairs(needs) do
      local is, behind, soon, count = crowded(need, jid, created)
      if is and not full then full, before, early, ahead, of = true, behind, soon, count, need end
    end
    if created == 'inf' then -- it is not to run
      of = nil
      for _, need in ipairs(needs) do vain[need.name] = need end
    elseif not full then
      local said = ''
      for _, need in ipairs(needs) do said = said .. need.text .. ' ' end
      redis.call('HSET', mine, sequence, said .. '\n' .. jid) -- first: what is taken is somebody's, whatever comes
      for _, need in ipairs(needs) do
        if need.span == 0 then redis.call('HSET', need.locked, jid, now) end
      end
      occupy(needs, now, sequence, id .. '/')
    elseif of.waits then
      local due = turn_of(of, now, before, ahead)
      local waiting, parked = key('barnabas:waiting:' .. of.name), key('barnabas:parked:' .. of.name)
      local at = string.format('%.6f', due + early) -- whose clock moved it too early moves it in time then
      redis.call('ZADD', key('schedule'), at, payload)
      redis.call('ZADD', waiting, created, jid)
      redis.call('HSET', parked, jid, at .. string.format(' %.6f ', due) .. name .. ' ' .. of.text .. ' ' .. payload)
      redis.call('HDEL', work, fields[i])
      local left = math.ceil(due + early - now) + 600
      if redis.call('TTL', waiting) < left then
        lasts(of, waiting, left)
        redis.call('EXPIRE', parked, left)
      end
      answer, calm = 0, false
      if of.span > 0 and (soonest == '' or due - now < soonest) then soonest = due - now end
    else
      answer = holder(of.name) or redis.call('ZRANGE', key('barnabas:turns:' .. of.name), 0, 0)[1] or '?'
    end
    for _, need in ipairs(calm and {} or needs) do -- it needs its turns no more; those it could not use are others'
      if redis.call('ZREM', key('barnabas:turns:' .. need.name), jid) == 1 or need == of then wake(need, now) end
    end
  end
  if answer == 1 and lock ~= '' then free(lock, jid) end
  answers[i] = answer
end
for _, need in pairs(vain) do
  if hasten(need, now) then soonest = 0 end
end
return {soonest == '' and '' or string.format('%.6f', soonest), answers}

--- hold
-- Take a slot by hand, for so many seconds: 0 if there was one, else how long until it is to be asked for again; until then it
-- is wanted.
local token, need, lease, want, now = arg(), slots(arg()), number(), number(), clock()
redis.call('ZREM', key(need.name .. ':WANTS'), token)
if vacant(need, need.most - promised(need, now), now) then
  occupy({need}, now, token, '')
  if need.span == 0 then
    redis.call('ZADD', key(need.name .. ':HANDS'), now + lease, token)
    lasts(need, key(need.name .. ':HANDS'), lease + 60)
  end
  return '0'
end
redis.call('ZADD', key(need.name .. ':WANTS'), now + want, token)
lasts(need, key(need.name .. ':WANTS'), 60)
return string.format('%.6f', math.max(0.01, turn_of(need, now) - now))

--- taken
-- Of each limit: how many slots are taken, how many jobs wait, and when a rate that has none free has one.
local found, now = {}, clock()
for i = 1, number() do
  local need, taken, free = slots(arg()), 0, ''
  if need.span > 0 then
    local starts = key(need.name .. ':STARTS')
    taken = redis.call('ZCOUNT', starts, string.format('(%.6f', now - need.span), '+inf')
    if taken >= need.most then free = string.format('%.6f', nth(starts, need.most) + need.span) end
  else
    taken = redis.call('HLEN', need.locked) + redis.call('ZCOUNT', key(need.name .. ':HANDS'), now, '+inf')
  end
  found[i] = {taken, redis.call('ZCARD', key('barnabas:waiting:' .. need.name)), free}
end
return found

--- rouse
-- Of limits (their names) for which somebody waits: let those begin who can, and bring those of a rate forward, those of the
-- next two minutes, who wait behind jobs that somebody has deleted: nobody else tells them.
local now, schedule = clock(), key('schedule')
for _ = 1, number() do
  local name, due = arg(), nil
  local waiting, parked = key('barnabas:waiting:' .. name), key('barnabas:parked:' .. name)
  local first = redis.call('ZRANGE', waiting, 0, 0)[1]
  local text = first and string.match(redis.call('HGET', parked, first) or '', '^%S+ %S+ %S+ (%S+)')
  local need = text and slots(text)
  if need then wake(need, now) end
  for _, jid in ipairs(need and need.span > 0 and redis.call('ZRANGE', waiting, 0, 999) or {}) do
    local at, rest, payload = string.match(redis.call('HGET', parked, jid) or '', '^(%S+) %S+( %S+ %S+ (.*))$')
    local score = at and redis.call('ZSCORE', schedule, payload)
    if at and not score and tonumber(at) > now then -- it is not on its way either: it was deleted, or comes by itself
      redis.call('ZREM', waiting, jid)
      redis.call('HDEL', parked, jid)
    else
      due = due and due + need.span / need.most or turn_of(need, now)
      if due > now + 120 then break end
      if score and tonumber(score) == tonumber(at) and tonumber(at) > due + 1 then
        redis.call('ZADD', schedule, string.format('%.6f', due), payload)
        redis.call('HSET', parked, jid, string.format('%.6f %.6f', due, due) .. rest)
      end
    end
  end
end

--- keep
-- Let a slot by hand last for so many seconds more. Returns whether it was good still.
local token, need, lease, now = arg(), slots(arg()), number(), clock()
local hands = key(need.name .. ':HANDS')
if (tonumber(redis.call('ZSCORE', hands, token)) or 0) < now then return 0 end
redis.call('ZADD', hands, now + lease, token)
lasts(need, hands, lease + 60)
return 1

--- drop
-- Give a slot by hand back, or the wish for one; `begun`: nothing was done with it, so a start does not count.
local token, need, begun, now = arg(), slots(arg()), arg() == '1', clock()
redis.call('ZREM', key(need.name .. ':WANTS'), token)
redis.call('ZREM', key(need.name .. ':HANDS'), token)
redis.call('ZREMRANGEBYSCORE', key(need.name .. ':HANDS'), '-inf', now)
if not begun then redis.call('ZREM', key(need.name .. ':STARTS'), token) end
if need.span == 0 then wake(need, now) end

--- store
-- Store a job that takes a lock. Returns the id of the job that has it: then it is not stored, but buried if it asked for
-- that. A lock of its own is an earlier try's, whose answer was lost. With the id of the one that has it, where that waits (a set,
-- or else a queue), as what, and at which place: instead of that, if it is still there. Last come the notes that tell who waits
-- for what is buried or replaced.
local lock, jid, now, ends, how = arg(), arg(), arg(), arg(), arg()
local name, due, payload, buried = arg(), arg(), arg(), arg()
local first, set, queue, waits, at = arg(), arg(), key('queue:' .. arg()), arg(), number()

local function tell()
  for _ = 1, number() do
    local name, said, left = key('barnabas:note:' .. arg()), arg(), arg()
    redis.call('SET', name, said, 'PX', left)
    redis.call('PUBLISH', name, '')
  end
end

-- LREM looks at all that stands before it: 7 ms for 100,000 jobs. Who is farther from either end gives way to the newest.
local function taken_out()
  for i, job in ipairs(redis.call('LRANGE', queue, at, at + 1999)) do -- others have come
    local here, last = at + i - 1, redis.call('LLEN', queue) - 1
    if job == waits and math.min(here, last - here) < 100000 then
      return redis.call('LREM', queue, here < last - here and 1 or -1, waits)
    elseif job == waits then
      redis.call('LSET', queue, here, redis.call('LINDEX', queue, 0))
      redis.call('LPOP', queue)
      return 1
    end
  end
end

local place, other = key(due ~= '' and 'schedule' or 'queue:' .. name), holder(lock)
if other == jid then return '' end
if not (fits(place, due ~= '' and 'zset' or 'list') and fits(key('queues'), 'set') and fits(key('barnabas:locks'), 'hash')) then
  return redis.error_reply('WRONGTYPE ' .. place .. ', queues or barnabas:locks is none') -- no lock without its job
end
if other == first and (set ~= '' and redis.call('ZREM', key(set), waits) or set == '' and taken_out()) == 1 then
  free(lock, other)
  tell()
  other = false
end
if other then
  if how == 'reject' then
    redis.call('ZADD', key('dead'), now, buried)
    trim(now)
    tell()
  end
  return other
end
take(lock, jid, now, ends)
if due ~= '' then
  redis.call('ZADD', place, due, payload)
else
  redis.call('SADD', key('queues'), name)
  redis.call('LPUSH', place, payload)
end
return ''

--- free
-- A lock whose job is stored nowhere.
free(arg(), arg())

--- retake
-- A lock whose job others have called back from the dead, as they do without it.
local lock = arg()
if not holder(lock) then take(lock, arg(), arg(), '') end
