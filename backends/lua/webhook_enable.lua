-- Forget an endpoint's troubles, and try what waits for it now: its receiver is back.
-- ARGV    1 URL
-- returns {1: it had troubles, how many events were waiting}
local AT_MOST = 20000
local endpoint, now = endpoint_of(ARGV[1]), now_ms()
local queue, waiting = string.format(QUEUE, endpoint), 0
local had = redis.call('DEL', string.format(ENDPOINT, endpoint))
redis.call('ZREM', TROUBLED, endpoint)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '(' .. whole(now), '+inf', 'LIMIT', 0, AT_MOST)) do
  local event = string.format(EVENT, id)
  local next = redis.call('HGET', event, 'next')
  if next and tonumber(next) > now then  -- else it is under way
    redis.call('HSET', event, 'next', whole(now))
    redis.call('ZADD', queue, whole(now), id)
    waiting = waiting + 1
  end
end
look_when_due(endpoint, ARGV[1], now, now)
redis.call('PUBLISH', BELL, endpoint)
return {had, waiting}
