-- Not a script: stands behind clock.lua, in front of those that queue events for webhooks or deliver them.
--
-- An event is a hash. While it is to be delivered its id stands in its endpoint's queue under the ms of its next
-- try, the endpoint among its host's under the ms when somebody must look at that queue, and the host in HOSTS: so a
-- million events of one endpoint, or endpoints of one host, stand in nobody's way. What was looked at goes behind what
-- waits. An endpoint is its URL up to the query, by the start of its SHA-1: queries often name the job, and a server
-- that fails does so for all of them. It has a hash of its own only while it is in trouble, or one of its URLs is
-- switched off; those are fields of it, by the whole URL.
local EVENT, QUEUE, ENDPOINT = '{webhook}', '{webhook_queue}', '{webhook_endpoint}'
local HOST, HOSTS, TROUBLED, BELL = '{webhook_host}', '{hosts}', '{troubled}', '{bell}'
local PENDING, DELIVERED, FAILED = '{pending}', '{delivered}', '{failed}'

local TROUBLE = 5  -- failures in a row: from here on an endpoint is tried with one event at a time
local DAY = 86400000
local KEEP = {pending = 30 * DAY, delivered = 3 * DAY, failed = 30 * DAY}
local LIMIT = {delivered = 10000, failed = 100000}  -- events kept for people to look at; older ones go
local INDEX = {pending = PENDING, delivered = DELIVERED, failed = FAILED}

local function now_ms()
  local time = clock()
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function whole(number)
  return string.format('%.0f', number)
end

-- The URL with its names in lower case, no default port and a path; and the host alone. `normal_url` in
-- schemas/webhook.py does the same. A record without its URL (false) is one that has none, and can still be ended.
local function normal_url(url)
  url = url or ''
  local scheme, authority, rest = string.match(url, '^(%a+)://([^/?#]*)(.*)$')
  if not scheme then
    return url, ''
  end
  scheme = string.lower(scheme)
  authority = string.gsub(string.lower(authority), scheme == 'https' and ':0*443$' or ':0*80$', '')
  authority = string.gsub(string.gsub(authority, '%.$', ''), '%.(:%d*)$', '%1')
  if string.sub(rest, 1, 1) ~= '/' then
    rest = '/' .. rest
  end
  return scheme .. '://' .. authority .. rest, string.gsub(authority, ':%d*$', '')
end

local function host_of(url)
  local _, host = normal_url(url)
  return host
end

local function endpoint_url(url)
  return string.match(normal_url(url), '^[^?#]*')
end

local function name_of(url)
  return string.sub(redis.sha1hex(url), 1, 16)
end

local function endpoint_of(url)
  return name_of(endpoint_url(url))
end

-- The field of an endpoint that says when this one of its URLs was switched off.
local function gone_field(url)
  return 'gone:' .. name_of((normal_url(url)))
end

-- Look at `member` of `index` when the first of `within` is due, and not before `at`.
local function look(index, member, within, at)
  local first = redis.call('ZRANGE', within, 0, 0, 'WITHSCORES')
  if first[1] then
    redis.call('ZADD', index, whole(math.max(tonumber(first[2]), at)), member)
  else
    redis.call('ZREM', index, member)
  end
end

local function look_at_host(host, at)
  look(HOSTS, host, string.format(HOST, host), at)
end

local function look_at_endpoint(endpoint, host, at)
  look(string.format(HOST, host), endpoint, string.format(QUEUE, endpoint), at)
end

-- Look at the endpoint, and so at its host, when its first event is due, and not before `at`.
local function look_when_due(endpoint, url, at, now)
  local host = host_of(url)
  look_at_endpoint(endpoint, host, at)
  look_at_host(host, now)
end

local function make_pending(id, endpoint, url, now)
  local host = host_of(url)
  for key, member in pairs({
    [string.format(QUEUE, endpoint)] = id, [string.format(HOST, host)] = endpoint, [HOSTS] = host,
  }) do
    redis.call('ZADD', key, 'LT', whole(now), member)
    redis.call('PEXPIRE', key, KEEP.pending)
  end
  redis.call('ZADD', PENDING, whole(now), id)
  redis.call('PEXPIRE', PENDING, KEEP.pending)
  redis.call('PEXPIRE', string.format(EVENT, id), KEEP.pending)
  redis.call('PUBLISH', BELL, id)
end

-- What tells the same has the same id, whoever tells it and however often. `began`: when the job or batch was sent,
-- since a name may come again, with an idempotency key, say; `part`: which of several of a kind.
local function event_id(kind, subject, began, part)
  return 'evt_' .. string.sub(redis.sha1hex(table.concat({kind, subject, began, part}, '\n')), 1, 32)
end

-- Queue an event for delivery. Its id follows from what it tells, so that telling it twice makes one event.
local function put_event(id, kind, url, data)
  local event = string.format(EVENT, id)
  if redis.call('EXISTS', event) == 1 then
    return 0
  end
  local now, endpoint = now_ms(), endpoint_of(url)
  local at = whole(now)
  redis.call('HSET', event, 'type', kind, 'url', url, 'endpoint', endpoint, 'data', data, 'at', at, 'since', at,
    'next', at, 'state', 'pending', 'tries', 0, 'step', 0)
  make_pending(id, endpoint, url, now)
  return 1
end

-- The event is delivered, or given up: it stays a while to be looked at, and sent again if somebody asks.
local function end_event(id, endpoint, state, why, now)
  local event, index = string.format(EVENT, id), INDEX[state]
  redis.call('HSET', event, 'state', state, 'ended', whole(now), 'why', why)
  redis.call('HDEL', event, 'next')
  redis.call('PEXPIRE', event, KEEP[state])
  redis.call('ZREM', string.format(QUEUE, endpoint), id)
  redis.call('ZREM', PENDING, id)
  redis.call('ZADD', index, whole(now), id)
  redis.call('ZREMRANGEBYSCORE', index, '-inf', whole(now - KEEP[state]))
  local surplus = redis.call('ZCARD', index) - LIMIT[state]
  if surplus > 0 then
    local gone = redis.call('ZPOPMIN', index, surplus)
    for at = 1, #gone, 2 do
      redis.call('DEL', string.format(EVENT, gone[at]))
    end
  end
  redis.call('PEXPIRE', index, KEEP[state])
end

