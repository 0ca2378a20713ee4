-- The scripts of `redis:`, each after a line `--- name`; what stands before the first one goes in front of each.
-- ARGV: the prefix of all keys, then what `arg` and `number` take, in their order. Payloads pass through as the bytes they
-- are: cjson.encode would turn [] into {} and cut large integers. Nothing here is newer than Redis 6.2.

local at, prefix = 1, ARGV[1]

local function arg()
  at = at + 1
  return ARGV[at]
end

local function number()
  return tonumber(arg())
end

local function key(name)
  return prefix .. name
end

-- Lua's stack has room for about 8,000 values.
local function packed(command, name, values, from, to)
  local count, last = 0, to or #values
  for first = from or 1, last, 1000 do
    count = count + redis.call(command, name, unpack(values, first, math.min(first + 999, last)))
  end
  return count
end

local function count(name, day, n)
  redis.pcall('INCRBY', key('stat:' .. name), n) -- (somebody's rubbish there is no reason to stop in the middle)
  local today = key('stat:' .. name .. ':' .. day)
  if redis.pcall('INCRBY', today, n) == n then
    redis.call('EXPIRE', today, 157680000)
  end
end

-- Whether a key may be used as what it is to be. An error ends a script in its middle, and nothing is undone: so what is to be
-- stored is stored before it is taken away.
local function fits(name, kind)
  local found = redis.call('TYPE', name).ok
  return found == 'none' or found == kind
end

local kinds = {queues = 'set', processes = 'set', paused = 'set', ['barnabas:workers'] = 'hash', schedule = 'zset', retry = 'zset',
  dead = 'zset'} -- the others that are asked for are lists

-- Keep the dead within Sidekiq's bounds: half a year, and less than 10,000. To be called whenever one is buried.
local function trim(now)
  redis.call('ZREMRANGEBYSCORE', key('dead'), '-inf', now - 15552000)
  redis.call('ZREMRANGEBYRANK', key('dead'), 0, -10000)
end

-- Give what a process was handed by its blocking moves back to the front of the queue, the oldest foremost; returns how many.
local function unland(land, queue)
  local count = redis.pcall('LLEN', land)
  if type(count) ~= 'number' or count == 0 or not fits(queue, 'list') then return 0 end
  for _ = 1, count do redis.call('LMOVE', land, queue, 'LEFT', 'RIGHT') end
  return count
end

-- Locks of unique jobs, in the keys of sidekiq-unique-jobs: a hash of the job ids that hold one. `barnabas:locks` names those
-- of jobs of ours that are stored, `barnabas:running:<process>` the slots that its runs have: number -> limits and id.
local function holder(lock)
  return redis.call('HKEYS', key(lock .. ':LOCKED'))[1]
end

local function take(lock, jid, now, ends)
  redis.call('HSET', key(lock .. ':LOCKED'), jid, now)
  if ends == '' then
    redis.call('HSET', key('barnabas:locks'), lock, jid)
  else
    redis.call('PEXPIREAT', key(lock .. ':LOCKED'), ends)
  end
end

local function free(lock, jid)
  if redis.call('HDEL', key(lock .. ':LOCKED'), jid) == 1 then redis.call('HDEL', key('barnabas:locks'), lock) end
end

-- Batches: three sets of members' ids, `barnabas:batch:<id>:open`, `:done` and `:dead`. Those in ARGV have ended; whether
-- somebody is to look at the batch.
local function leave(id, how, from, to)
  local sets, died = key('barnabas:batch:' .. id .. ':'), 0
  if how == 'done' then
    local moved = packed('SREM', sets .. 'open', ARGV, from, to)
    if redis.call('EXISTS', sets .. 'dead') == 1 then moved = moved + packed('SREM', sets .. 'dead', ARGV, from, to) end
    if moved > 0 then packed('SADD', sets .. 'done', ARGV, from, to) end
  else
    for i = from, to do
      local moved = redis.call('SMOVE', sets .. 'open', sets .. 'dead', ARGV[i])
      if moved == 1 then redis.call('SREM', sets .. 'done', ARGV[i]) end -- (it was repeated)
      died = died + moved
    end
  end
  return died > 0 or redis.call('EXISTS', sets .. 'open') == 0
end

--- turn
-- Settle what is finished and claim the next, in one step. Each settlement counts only if the job is still in this
-- process's hands. Returns whether the process is still among the living (-1: nothing was done, since of the keys named first, to
-- which jobs go, these are somebody else's), how many were settled, the paused queues, the claimed payloads queue by queue, and
-- of those that had crashes: number and count.
local id, now, day = arg(), arg(), arg()
local work, processed, failed, ripe, strange = key('barnabas:work:' .. id), 0, 0, {}, {}

for _ = 1, number() do
  local name = arg()
  if not fits(key(name), kinds[name] or 'list') then strange[#strange + 1] = name end
end
if #strange > 0 then return {-1, strange, {}, {}, {}, {}} end
if not fits(work, 'hash') then return redis.error_reply('WRONGTYPE ' .. work .. ' is no hash') end

for _ = 1, number() do -- members of a batch, the oldest first: while that is ours, so are those that were claimed later
  local batch, how, count = arg(), arg(), number()
  local field, last = at + 1, at + 2 * count
  while field <= at + count and redis.call('HEXISTS', work, ARGV[field]) == 0 do field = field + 1 end
  if field <= at + count and leave(batch, how, field + count, last) then ripe[#ripe + 1] = batch end
  at = last
end

for _ = 1, number() do -- locks of those that are over
  local field, lock, jid = arg(), arg(), arg()
  if redis.call('HEXISTS', work, field) == 1 then free(lock, jid) end
end
for _ = 1, number() do -- runs that did not begin ("back"), or were cut off ("front"), or have ended ("end")
  local how, numbers = arg(), {}
  for i = 1, number() do numbers[i] = arg() end
  ended(id, how, numbers)
end

local done = {}
for i = 1, number() do done[i] = arg() end
processed = packed('HDEL', work, done)

for _ = 1, number() do
  local field, due, payload = arg(), arg(), arg()
  if redis.call('HEXISTS', work, field) == 1 then
    redis.call('ZADD', key('retry'), due, payload)
    redis.call('HDEL', work, field)
    failed = failed + 1
  end
end

local buried = 0
for _ = 1, number() do
  local field, payload = arg(), arg()
  if redis.call('HEXISTS', work, field) == 1 then
    redis.call('ZADD', key('dead'), now, payload)
    redis.call('HDEL', work, field)
    buried = buried + 1
  end
end
if buried > 0 then trim(now) end
failed = failed + buried

for _ = 1, number() do -- given back: the youngest first, so that the oldest ends up in front; or put at the end, as `last`
  local field, name, last = arg(), arg(), arg()
  local payload = fits(key('queue:' .. name), 'list') and redis.call('HGET', work, field)
  if payload then
    redis.call(last == '' and 'RPUSH' or 'LPUSH', key('queue:' .. name), last == '' and payload or last)
    redis.call('HDEL', work, field)
  end
end

local innocent = number() -- had a run of their own, and it did not crash
for _ = 1, innocent do redis.pcall('HDEL', key('barnabas:crashes'), arg()) end
if innocent > 0 then redis.call('DEL', key('barnabas:alone:' .. id)) end

if processed + failed > 0 then count('processed', day, processed + failed) end
if failed > 0 then count('failed', day, failed) end

local room, sequence, landed, few = number(), number(), number(), number() -- few: of those that had crashes
local settled = processed + failed
if redis.call('HEXISTS', key('barnabas:workers'), id) == 0 then return {0, settled, {}, {}, {}, ripe} end
local shut, paused, found, crashed = fits(key('paused'), 'set') and redis.call('SMEMBERS', key('paused')), {}, {}, {}
for _, name in ipairs(shut or {}) do paused[name] = true end
local counted = redis.call('TYPE', key('barnabas:crashes')).ok == 'hash'

for i = 1, number() do
  local name, free, jobs = arg(), math.min(room, number()), {}
  local queue, land = key('queue:' .. name), key('barnabas:landing:' .. id .. ':' .. name)
  if landed == 1 then
    while #jobs < free and not paused[name] do
      local job = redis.pcall('RPOP', land)
      if type(job) ~= 'string' then break end
      jobs[#jobs + 1] = job
    end
    unland(land, queue)
  end
  if #jobs < free and not paused[name] then
    local got = redis.pcall('RPOP', queue, free - #jobs) -- not a list: somebody else's key, and none of ours
    if type(got) == 'table' and not got.err then
      for _, job in ipairs(got) do jobs[#jobs + 1] = job end
    end
  end
  local entries = {}
  for i, job in ipairs(jobs) do
    local crashes = counted and redis.call('HGET', key('barnabas:crashes'), redis.sha1hex(job))
    if crashes then
      if #crashed == 2 * few and fits(queue, 'list') then -- more could not begin now, and would be in hand at the next crash
        for _ = i, #jobs do redis.call('RPUSH', queue, table.remove(jobs)) end
        break
      end
      crashed[#crashed + 1] = sequence + 1
      crashed[#crashed + 1] = tonumber(crashes)
    end
    sequence = sequence + 1
    entries[#entries + 1] = string.format('%d:', sequence) .. name
    entries[#entries + 1] = job
  end
  room = room - #jobs
  packed('HSET', work, entries)
  found[i] = jobs
end
return {1, settled, shut, found, crashed, ripe}

--- leave
-- Members of a batch have ended, whatever they wait for. Returns whether somebody is to look at it.
return leave(arg(), arg(), at + 1, #ARGV) and 1 or 0

--- recover
-- Put all that a process holds back to the front of its queues; `crashed`: because it died, so count that against what it
-- had in hand. A job that ran alone is the only one to be counted beyond three. `stays`: it ends only now, so the locks of
-- its runs stay until it is found dead. What is of a queue that is somebody else's key stays where it is, and the process on
-- the list. Returns how many went back (-1: it lives), and the queues of those that did not.
local id, crashed, stays = arg(), arg() == '1', arg() == '1'
if crashed and redis.call('EXISTS', key('barnabas:alive:' .. id)) == 1 then return {-1, {}} end
local work, total, strange, back, jobs = key('barnabas:work:' .. id), 0, {}, {}, {}

local function is_list(name)
  if not back[name] then
    back[name] = {fits = fits(key('queue:' .. name), 'list'), fields = {}}
    if not back[name].fits then strange[#strange + 1] = name end
  end
  return back[name].fits
end

for name in string.gmatch(redis.call('HGET', key('barnabas:workers'), id) or '', '%S+') do
  local land = key('barnabas:landing:' .. id .. ':' .. name)
  total = total + unland(land, key('queue:' .. name))
  if redis.call('EXISTS', land) == 1 then is_list(name) end
end
local fields = redis.call('HGETALL', work)
for i = 1, #fields, 2 do
  local sequence, name = string.match(fields[i], '^(%d+):(.*)$')
  if name and is_list(name) then jobs[#jobs + 1] = {tonumber(sequence), name, fields[i + 1], fields[i]} end
end
table.sort(jobs, function(a, b) return a[1] > b[1] end)
local there, runs = {}, {front = {}, ['end'] = {}}
for i = 1, #fields, 2 do there[string.match(fields[i], '^%d*')] = true end
for _, number in ipairs(stays and {} or redis.call('HKEYS', key('barnabas:running:' .. id))) do
  table.insert(runs[there[number] and 'front' or 'end'], number)
end
ended(id, 'front', runs.front)
ended(id, 'end', runs['end'])
for _, job in ipairs(jobs) do
  table.insert(back[job[2]], job[3])
  table.insert(back[job[2]].fields, job[4])
end
for name, of in pairs(back) do
  if #of > 0 then
    redis.pcall('SADD', key('queues'), name)
    packed('RPUSH', key('queue:' .. name), of)
    packed('HDEL', work, of.fields)
  end
end
local alone, crashes = tonumber(redis.call('GET', key('barnabas:alone:' .. id))), key('barnabas:crashes')
crashed = crashed and fits(crashes, 'hash')
for _, job in ipairs(crashed and jobs or {}) do
  if not alone or alone == job[1] then
    local digest = redis.sha1hex(job[3])
    local before = tonumber(redis.call('HGET', crashes, digest)) or 0
    redis.call('HSET', crashes, digest, alone and 4 or math.max(before, math.min(3, before + 1)))
  end
end
if crashed and #jobs > 0 then redis.call('EXPIRE', crashes, 604800) end
if stays then
  redis.call('EXPIRE', key('barnabas:alive:' .. id), 2)
else
  redis.call('DEL', key('barnabas:alive:' .. id))
  if #strange == 0 then
    redis.call('DEL', key('barnabas:alone:' .. id))
    redis.call('HDEL', key('barnabas:workers'), id)
  end
end
redis.pcall('SREM', key('processes'), id)
redis.call('UNLINK', key(id .. ':work'), key(id .. ':workers'))
return {total + #jobs, strange}

--- renew
-- A sign of life, good for `lease` seconds; with the names of its queues, join the living. 0: it is not among them. What a
-- blocking move brought whose connection was lost meanwhile goes back to its queue: a process that is busy does not look for it.
local id, lease, queues = arg(), arg(), arg()
if queues ~= '' then
  redis.call('HSET', key('barnabas:workers'), id, queues)
elseif redis.call('HEXISTS', key('barnabas:workers'), id) == 0 then
  return 0
end
redis.call('SET', key('barnabas:alive:' .. id), '1', 'EX', lease)
for name in string.gmatch(redis.call('HGET', key('barnabas:workers'), id), '%S+') do
  unland(key('barnabas:landing:' .. id .. ':' .. name), key('queue:' .. name))
end
return 1

--- orphans
-- The processes that are registered and gave no sign of life for a lease.
local dead = {}
for _, id in ipairs(redis.call('HKEYS', key('barnabas:workers'))) do
  if redis.call('EXISTS', key('barnabas:alive:' .. id)) == 0 then dead[#dead + 1] = id end
end
return dead

--- move
-- Take members out of a sorted set, each only if it is still there, and push what became of them onto their queues; those
-- without a queue, or whose queue is no list, are buried, and stay where they are if `dead` is somebody else's key. They come in
-- stretches of one queue: each with what becomes of it, or with `tail` in place of its last brace. Returns the queues that are
-- no lists, and how many members stay.
local set, now, tail, queues, names, strange, stay = key(arg()), arg(), arg(), {}, {}, {}, 0
local buries = fits(key('dead'), 'zset')
for _ = 1, number() do
  local name, plain = arg(), arg() == '1'
  local jobs = queues[name]
  if not jobs then
    jobs = {fits = name ~= '' and fits(key('queue:' .. name), 'list')}
    queues[name] = jobs
    names[#names + 1] = name
    if name ~= '' and buries and not jobs.fits then strange[#strange + 1] = name end
  end
  for _ = 1, number() do
    local member = arg()
    local payload = not plain and arg()
    if not (jobs.fits or buries) then
      stay = stay + 1
    elseif redis.call('ZREM', set, member) == 1 then
      jobs[#jobs + 1] = payload or string.sub(member, 1, -2) .. tail
    end
  end
end
for _, name in ipairs(names) do
  local jobs = queues[name]
  if #jobs > 0 and jobs.fits then
    redis.pcall('SADD', key('queues'), name)
    redis.call('LPUSH', key('queue:' .. name), unpack(jobs))
  elseif #jobs > 0 then
    for _, payload in ipairs(jobs) do redis.call('ZADD', key('dead'), now, payload) end
    trim(now)
  end
end
return {strange, stay}

--- shift
-- Make jobs ready ("ready"), bury them ("dead"), put them into another queue ("other") or drop them (""), wherever they wait.
-- Each comes with what becomes of it. Returns how many were there; those whose new place is somebody else's key stay.
local to, now, other, moved = arg(), arg(), arg(), 0
local buries = fits(key('dead'), 'zset')
for _ = 1, number() do
  local set, name, payload, fresh, lock, jid = arg(), arg(), arg(), arg(), arg(), arg()
  local queue, there, again = key('queue:' .. name), 0, to == 'ready' and set == 'dead' and lock ~= ''
  local score = to == 'other' and set ~= '' and redis.call('ZSCORE', key(set), payload)
  local target, has = to == 'other' and other or name, again and holder(lock)
  if (to == 'dead' and not buries) or (to ~= 'dead' and to ~= '' and not fits(key('queue:' .. target), 'list')) then
    there = 0
  elseif has and has ~= jid then -- it may not have its lock again
    there = 0
  elseif set == '' then
    there = redis.call('LREM', queue, -1, payload)
  else
    there = redis.call('ZREM', key(set), payload)
  end
  if there == 1 then
    moved = moved + 1
    if again then take(lock, jid, now, '') end
    if (to == 'dead' or to == '') and lock ~= '' then free(lock, jid) end
    if to == 'dead' then
      redis.call('ZADD', key('dead'), now, fresh)
    elseif score then
      redis.call('ZADD', key(set), score, fresh)
    elseif to ~= '' then
      redis.pcall('SADD', key('queues'), target)
      redis.call('LPUSH', key('queue:' .. target), fresh)
    end
  end
end
if to == 'dead' and moved > 0 then trim(now) end
return moved

--- hands
-- How many jobs of each queue are in processes' hands; what has landed with one counts as that.
local held, flat = {}, {}
local workers = redis.call('HGETALL', key('barnabas:workers'))
for i = 1, #workers, 2 do
  for name in string.gmatch(workers[i + 1], '%S+') do
    held[name] = (held[name] or 0) + redis.call('LLEN', key('barnabas:landing:' .. workers[i] .. ':' .. name))
  end
  for _, field in ipairs(redis.call('HKEYS', key('barnabas:work:' .. workers[i]))) do
    local name = string.match(field, ':(.*)$')
    held[name] = (held[name] or 0) + 1
  end
end
for name, count in pairs(held) do flat[#flat + 1] = {name, count} end
return flat

--- sizes
-- How many jobs wait in the schedule and to be retried (with a time: of which it has come), how many are dead, how many are in
-- each queue; the next of each queue; and the keys among these that are somebody else's.
local now, others, found, sizes, nexts = arg(), {}, {}, {}, {}
local function size(name, kind, command, ...)
  if fits(key(name), kind) then return redis.call(command, key(name), ...) end
  others[#others + 1] = name
  return 0
end
for i, name in ipairs({'schedule', 'retry', 'dead'}) do
  if now == '' or i == 3 then found[i] = size(name, 'zset', 'ZCARD') else found[i] = size(name, 'zset', 'ZCOUNT', '-inf', now) end
end
for i = at + 1, #ARGV do
  sizes[#sizes + 1] = size('queue:' .. ARGV[i], 'list', 'LLEN')
  nexts[#nexts + 1] = sizes[#sizes] > 0 and redis.call('LINDEX', key('queue:' .. ARGV[i]), -1)
end
return {found[1], found[2], found[3], sizes, nexts, others}

--- page
-- At most so many jobs of a queue that stand before the place (from 0, where the newest is) that was told last, when this was the
-- newest: others have come since. Returns their first place, which is now the newest, and the jobs; at first those of the end.
local queue, newest, stop, most = key('queue:' .. arg()), arg(), number(), number()
local come = stop and redis.call('LPOS', queue, newest, 'MAXLEN', 100000) or 0
stop = math.min(stop and stop + come or math.huge, redis.call('LLEN', queue))
local start = math.max(0, stop - most)
return {start, redis.call('LINDEX', queue, 0) or '', stop > 0 and redis.call('LRANGE', queue, start, stop - 1) or {}}

--- strange
-- Those of these keys that are somebody else's, of another type: each with what it is, and what it should be.
local found = {}
for i = at + 1, #ARGV do
  local name, wanted = ARGV[i], kinds[ARGV[i]] or 'list'
  if not fits(key(name), wanted) then found[#found + 1] = {name, redis.call('TYPE', key(name)).ok, wanted} end
end
return found

--- swap
-- Store a note and push jobs, if the note still is what it was ("": absent). Returns whether it was.
local name, old, new, left = key(arg()), arg(), arg(), arg()
if (redis.call('GET', name) or '') ~= old then return 0 end
redis.call('SET', name, new, 'PX', left)
for _ = 1, number() do
  local queue, payload = arg(), arg()
  redis.call('SADD', key('queues'), queue)
  redis.call('LPUSH', key('queue:' .. queue), payload)
end
return 1
