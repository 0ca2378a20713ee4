-- Slots of limits, of which a lock of runs is one. Those who have one: `:LOCKED` (a hash of job ids), `:HANDS` (a sorted set
-- of tokens, by hand, and until when they are good), or of a rate `:STARTS` (by the time of their start). `:WANTS`: who asks by
-- hand, and until when that counts. Who waits: `barnabas:waiting:` (job ids by age), `barnabas:parked:` (id -> when it is due,
-- queue, payload); `barnabas:turns:`: whose turn it is, until when. All by the server's clock.
local function clock()
  local t = redis.call('TIME')
  return t[1] + t[2] / 1e6
end

local function slots(text) -- "key,count,span,", and "!" if its jobs do not wait
  local name, most, span, mode = string.match(text, '^(.*),(%d+),(.*),(!?)$')
  return {text = text, name = name, most = tonumber(most), span = tonumber(span), waits = mode == ''}
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
  local count = redis.call('HLEN', key(need.name .. ':LOCKED'))
  if count < most then count = count + redis.call('ZCOUNT', key(need.name .. ':HANDS'), now, '+inf') end
  return count < most
end

local function wants(need, now)
  return redis.call('ZCOUNT', key(need.name .. ':WANTS'), now, '+inf')
end

-- Those who wait first for free slots go to the front of their queues, and it is their turn for 10 s.
local function wake(need, now)
  local waiting, parked = key('barnabas:waiting:' .. need.name), key('barnabas:parked:' .. need.name)
  while vacant(need, need.most - promised(need, now) - wants(need, now), now) do
    local jid = redis.call('ZPOPMIN', waiting)[1]
    if not jid then return end
    local due, name, payload = string.match(redis.call('HGET', parked, jid) or '', '^(%S+) (%S+) (.*)$')
    redis.call('HDEL', parked, jid)
    local there = payload and redis.call('ZREM', key('schedule'), payload) == 1
    if there then
      redis.call('SADD', key('queues'), name)
      redis.call('RPUSH', key('queue:' .. name), payload)
    end
    if there or (due and tonumber(due) <= now) then -- (it may be on its way already; else somebody has deleted it)
      redis.call('ZADD', key('barnabas:turns:' .. need.name), now + 10, jid)
      redis.call('EXPIRE', key('barnabas:turns:' .. need.name), 60)
    end
  end
end

-- A run has. `how`: it has not begun ("back"), or maybe it has ("front"), and its job is in front of its queue again, so it is
-- still that one's turn.
local function ended(id, sequence, how)
  local mine = key('barnabas:running:' .. id)
  local needs, jid = string.match(redis.call('HGET', mine, sequence) or '', '^(.-)\n(.*)$')
  if not jid then return end
  local now = clock()
  redis.call('HDEL', mine, sequence)
  for text in string.gmatch(needs, '%S+') do
    local need = slots(text)
    if need.span == 0 then
      redis.call('HDEL', key(need.name .. ':LOCKED'), jid)
      if how == 'back' or how == 'front' then
        redis.call('ZADD', key('barnabas:turns:' .. need.name), now + 10, jid)
        redis.call('EXPIRE', key('barnabas:turns:' .. need.name), 60)
      end
      wake(need, now)
    elseif how == 'back' then
      redis.call('ZREM', key(need.name .. ':STARTS'), id .. '/' .. sequence)
    end
  end
end

-- Take a slot of each.
local function occupy(needs, now, jid, member)
  for _, need in ipairs(needs) do
    if need.span > 0 then
      local place = key(need.name .. ':STARTS')
      local oldest, at = nth(place, need.most), now
      if oldest and oldest + need.span <= now and oldest + need.span > now - math.min(1, math.max(0.25, need.span / 11)) / 4 then
        at = oldest + need.span
      end
      redis.call('ZADD', place, at, member)
      redis.call('ZREMRANGEBYSCORE', place, '-inf', now - need.span - 2)
      redis.call('EXPIRE', place, math.ceil(need.span) + 60)
    end
  end
end

-- When somebody may look again who finds no slot.
local function turn_of(need, now, before)
  local base, apart = now + 60, 0.01
  if need.span > 0 then
    local oldest = nth(key(need.name .. ':STARTS'), need.most)
    base, apart = oldest and oldest + need.span or now + 0.1, need.span / need.most
    base = math.max(base, now + 0.01)
  else
    local hand = tonumber(redis.call('ZRANGEBYSCORE', key(need.name .. ':HANDS'), now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2])
    if hand then base = math.min(base, hand + 0.1) end -- its process may die
  end
  return before and math.max(base, before + apart) or base
end

--- admit
-- Of each claimed job that needs slots, or gives a lock back: 1 if it may begin; 0 if it waits, or is not in this process's
-- hands any more; else the id of the job that is at work.
local id, answers, soonest = arg(), {}, ''
local work, mine, now = key('barnabas:work:' .. id), key('barnabas:running:' .. id), clock()

-- Whether there is no slot, and if so behind whom it waits; how much too early it comes, by its own time.
local function crowded(need, jid, created)
  local waiting, parked = key('barnabas:waiting:' .. need.name), key('barnabas:parked:' .. need.name)
  local ahead, before, early, oldest = 0, nil, 0, nil
  if redis.call('EXISTS', waiting) == 1 then
    if redis.call('ZREM', waiting, jid) == 1 then
      local due = tonumber(string.match(redis.call('HGET', parked, jid) or '', '^%S+'))
      redis.call('HDEL', parked, jid)
      early = due and due > now + 0.005 and need.span > 0 and due - now or 0
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
      before = tonumber(string.match(redis.call('HGET', parked, last) or '', '^%S+'))
    end
  end
  local left = need.most - ahead - promised(need, now, jid)
  if left > 0 then left = left - wants(need, now) end
  local twin = need.span == 0 and redis.call('HEXISTS', key(need.name .. ':LOCKED'), jid) == 1
  return twin or not vacant(need, left, now), before, early
end

for i = 1, number() do
  local sequence, name, jid, lock, created, payload, needs = arg(), arg(), arg(), arg(), arg(), arg(), {}
  for n = 1, number() do needs[n] = slots(arg()) end
  local field, answer = sequence .. ':' .. name, 1
  if redis.call('HEXISTS', work, field) == 0 then
    answer = 0
  elseif #needs > 0 and redis.call('HEXISTS', mine, sequence) == 0 then
    local full, before, early, of
    for _, need in ipairs(needs) do
      local is, behind, soon = crowded(need, jid, created)
      if is and not full then full, before, early, of = true, behind, soon, need end
    end
    if not full then
      local said = ''
      for _, need in ipairs(needs) do
        if need.span == 0 then redis.call('HSET', key(need.name .. ':LOCKED'), jid, now) end
        said = said .. need.text .. ' '
      end
      occupy(needs, now, jid, id .. '/' .. sequence)
      redis.call('HSET', mine, sequence, said .. '\n' .. jid)
    elseif of.waits then
      local due = turn_of(of, now, before) + early
      local waiting, parked = key('barnabas:waiting:' .. of.name), key('barnabas:parked:' .. of.name)
      local at = string.format('%.6f', due)
      redis.call('HDEL', work, field)
      redis.call('ZADD', key('schedule'), at, payload)
      redis.call('ZADD', waiting, created, jid)
      redis.call('HSET', parked, jid, at .. ' ' .. name .. ' ' .. payload)
      local last = math.ceil(due - now) + 600
      if redis.call('TTL', waiting) < last then
        redis.call('EXPIRE', waiting, last)
        redis.call('EXPIRE', parked, last)
      end
      answer = 0
      if of.span > 0 and (soonest == '' or due - now < soonest) then soonest = due - now end
    else
      answer = holder(of.name) or redis.call('ZRANGE', key('barnabas:turns:' .. of.name), 0, 0)[1] or '?'
    end
    for _, need in ipairs(needs) do -- it needs its turns no more; those it could not use are others'
      if redis.call('ZREM', key('barnabas:turns:' .. need.name), jid) == 1 or need == of then wake(need, now) end
    end
  end
  if answer == 1 and lock ~= '' then free(lock, jid) end
  answers[i] = answer
end
return {soonest == '' and '' or string.format('%.6f', soonest), answers}

--- hold
-- Take a slot by hand, for so many seconds: 0 if there was one, else how long until it is to be asked for again; until then it
-- is wanted.
local token, need, lease, want, now = arg(), slots(arg()), number(), number(), clock()
redis.call('ZREM', key(need.name .. ':WANTS'), token)
if vacant(need, need.most - promised(need, now), now) then
  occupy({need}, now, '', token)
  if need.span == 0 then
    redis.call('ZADD', key(need.name .. ':HANDS'), now + lease, token)
    redis.call('EXPIRE', key(need.name .. ':HANDS'), lease + 60)
  end
  return '0'
end
redis.call('ZADD', key(need.name .. ':WANTS'), now + want, token)
redis.call('EXPIRE', key(need.name .. ':WANTS'), 60)
return string.format('%.6f', math.max(0.01, turn_of(need, now) - now))

--- keep
-- Let a slot by hand last for so many seconds more. Returns whether it was good still.
local token, need, lease, now = arg(), slots(arg()), number(), clock()
local hands = key(need.name .. ':HANDS')
if (tonumber(redis.call('ZSCORE', hands, token)) or 0) < now then return 0 end
redis.call('ZADD', hands, now + lease, token)
redis.call('EXPIRE', hands, lease + 60)
return 1

--- drop
-- Give a slot by hand back, or the wish for one; `begun`: nothing was done with it, so a start does not count.
local token, need, begun, now = arg(), slots(arg()), arg() == '1', clock()
redis.call('ZREM', key(need.name .. ':WANTS'), token)
redis.call('ZREM', key(need.name .. ':HANDS'), token)
redis.call('ZREMRANGEBYSCORE', key(need.name .. ':HANDS'), '-inf', now)
if not begun then redis.call('ZREM', key(need.name .. ':STARTS'), token) end
if need.span == 0 then wake(need, now) end
