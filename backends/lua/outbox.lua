-- Not a script: stands behind clock.lua, in front of those that queue events for webhooks or deliver them.
--
-- An event is a hash. While it is to be delivered its id stands in its endpoint's queue under the ms of its next
-- try, and the endpoint in ENDPOINTS under the ms when somebody must look at that queue: so an endpoint with a
-- million events stands in nobody's way. An endpoint is its URL up to the query, by the start of its SHA-1; it has
-- a hash of its own only while it is in trouble or switched off.
local EVENT, QUEUE, ENDPOINT = '{webhook}', '{webhook_queue}', '{webhook_endpoint}'
local ENDPOINTS, TROUBLED, BELL = '{endpoints}', '{troubled}', '{bell}'
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

local function endpoint_of(url)
  return string.sub(redis.sha1hex(string.match(url, '^[^?#]*')), 1, 16)
end

-- Try the event at `at`; look at its endpoint then at the latest.
local function queue_event(id, endpoint, at)
  local queue = string.format(QUEUE, endpoint)
  redis.call('ZADD', queue, whole(at), id)
  redis.call('ZADD', ENDPOINTS, 'LT', whole(at), endpoint)
  redis.call('PEXPIRE', queue, KEEP.pending)
  redis.call('PEXPIRE', ENDPOINTS, KEEP.pending)
end

-- Look at the endpoint when its first event is due, and not while it is held. Returns nothing.
local function look_when_due(endpoint, held_until)
  local first = redis.call('ZRANGE', string.format(QUEUE, endpoint), 0, 0, 'WITHSCORES')
  if first[1] then
    redis.call('ZADD', ENDPOINTS, whole(math.max(tonumber(first[2]), held_until)), endpoint)
  else
    redis.call('ZREM', ENDPOINTS, endpoint)
  end
end

local function make_pending(id, endpoint, now)
  queue_event(id, endpoint, now)
  redis.call('ZADD', PENDING, whole(now), id)
  redis.call('PEXPIRE', PENDING, KEEP.pending)
  redis.call('PEXPIRE', string.format(EVENT, id), KEEP.pending)
  redis.call('PUBLISH', BELL, id)
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
  make_pending(id, endpoint, now)
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

