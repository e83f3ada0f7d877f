-- What came of a try.
-- ARGV    1 id   2 number of the try   3 delivered, retry, failed, refused (by us) or gone (by its endpoint, for good)
--         4 next try in (ms)   5 its endpoint asks to be left alone for (ms)   6 the try, as JSON   7 why it failed
--         8 a factor that spreads the pauses of endpoints in trouble
-- returns {the event's state, or false: it had ended before, 1: its endpoint is in trouble or switched off as of now}
local TRIES_KEPT, PAUSE_FIRST, PAUSE_MAX = 40, 30000, 600000
local GONE_KEPT = 1000  -- URLs of an endpoint that are remembered as switched off; others are asked each time
local id, try, outcome = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local event, now = string.format(EVENT, id), now_ms()
local is = redis.call('HMGET', event, 'state', 'tries', 'endpoint', 'url', 'step')
if not is[1] then
  return {false, 0}
end
redis.call('HSET', event, 'try' .. try, ARGV[6])
redis.call('HDEL', event, 'try' .. try - TRIES_KEPT)

local endpoint = is[3]
local hash = string.format(ENDPOINT, endpoint)
local latest = tonumber(is[2]) == try  -- else its lease ran out: only good news count
local state = false
if is[1] == 'pending' and outcome == 'delivered' then
  state = 'delivered'
elseif is[1] == 'pending' and latest then
  state = outcome == 'retry' and 'pending' or 'failed'
end
if state == 'pending' then
  redis.call('HSET', event, 'next', whole(now + ARGV[4]), 'step', is[5] + 1, 'why', ARGV[7])
  redis.call('ZADD', string.format(QUEUE, endpoint), whole(now + ARGV[4]), id)
elseif state then
  end_event(id, endpoint, state, ARGV[7], now)
end

redis.call('PUBLISH', BELL, id)
if outcome == 'refused' then
  look_when_due(endpoint, is[4], now, now)
  return {state, 0}
elseif outcome == 'delivered' then
  redis.call('HDEL', hash, 'failures', 'hold', 'retry_at', 'since')
  if redis.call('HEXISTS', hash, 'disabled') == 0 then
    redis.call('DEL', hash)
    redis.call('ZREM', TROUBLED, endpoint)
  end
  look_when_due(endpoint, is[4], now, now)
  return {state, 0}
end

redis.call('HSET', hash, 'url', endpoint_url(is[4]), 'why', ARGV[7])
redis.call('PEXPIRE', hash, KEEP.failed)
redis.call('ZADD', TROUBLED, whole(now), endpoint)
redis.call('ZREMRANGEBYSCORE', TROUBLED, '-inf', whole(now - KEEP.failed))
redis.call('PEXPIRE', TROUBLED, KEEP.failed)
if outcome == 'gone' then  -- no trouble of the server's: it says that it has no use for this URL
  local news = 0
  if redis.call('HLEN', hash) < GONE_KEPT then
    news = redis.call('HSETNX', hash, gone_field(is[4]), whole(now))
  end
  redis.call('HSET', hash, 'disabled', whole(now))
  redis.call('HDEL', hash, 'hold')
  look_when_due(endpoint, is[4], now, now)
  return {state, news}
end

local failures, hold = redis.call('HINCRBY', hash, 'failures', 1), now
redis.call('HSETNX', hash, 'since', whole(now))
if failures >= TROUBLE then  -- the longer it lasts, the longer the pauses
  local lasts = now - redis.call('HGET', hash, 'since')
  hold = now + math.min(PAUSE_MAX, math.max(PAUSE_FIRST, lasts / 4)) * ARGV[8]
end
local retry_at = math.max(redis.call('HGET', hash, 'retry_at') or 0, now + ARGV[5])
redis.call('HSET', hash, 'hold', whole(hold), 'retry_at', whole(retry_at))
look_when_due(endpoint, is[4], math.max(hold, retry_at), now)
return {state, failures == TROUBLE and 1 or 0}
