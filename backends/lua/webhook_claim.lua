-- Take events whose time has come. Whoever takes one and dies has it come again when its lease is over.
-- ARGV    1 how many   2 how many of one endpoint are under way at most   3 how many for endpoints in trouble
--         4 lease (ms)   5 give an event up after (ms)   6... endpoint, how many the caller has under way, ...
-- returns {ms until the next one, or -1, {id, type, url, data, at (ms), tries with this one, step, endpoint}, ...}
--
-- An endpoint in trouble gets one event at a time. One that cannot be served now is put off a little, so that those
-- behind it are seen; the end of one of its tries brings it back at once.
local LOOK_AGAIN, PAGE, BURY = 200, 200, 100

local now, left, left_for_trouble = now_ms(), tonumber(ARGV[1]), tonumber(ARGV[3])
local under_way, taken = {}, {}
for at = 6, #ARGV, 2 do
  under_way[ARGV[at]] = tonumber(ARGV[at + 1])
end

local function take(id, endpoint)
  local event = string.format(EVENT, id)
  local is = redis.call('HMGET', event, 'type', 'url', 'data', 'at', 'step', 'since', 'state')
  if is[7] ~= 'pending' then  -- its record is gone
    redis.call('ZREM', string.format(QUEUE, endpoint), id)
    redis.call('ZREM', PENDING, id)
    return false
  elseif now - is[6] > tonumber(ARGV[5]) then
    end_event(id, endpoint, 'failed', 'gave_up', now)
    return false
  end
  local tries = redis.call('HINCRBY', event, 'tries', 1)
  redis.call('ZADD', string.format(QUEUE, endpoint), whole(now + ARGV[4]), id)
  taken[#taken + 1] = {id, is[1], is[2], is[3], is[4], tries, is[5], endpoint}
  return true
end

local function serve(endpoint)
  local hash, queue = string.format(ENDPOINT, endpoint), string.format(QUEUE, endpoint)
  local is = redis.call('HMGET', hash, 'failures', 'hold', 'disabled', 'retry_at')
  local hold, troubled = math.max(is[2] or 0, is[4] or 0), tonumber(is[1] or 0) >= TROUBLE
  if is[3] then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', whole(now), 'LIMIT', 0, BURY)) do
      end_event(id, endpoint, 'failed', 'endpoint_disabled', now)
    end
    return look_when_due(endpoint, 0)
  elseif hold > now then
    return look_when_due(endpoint, hold)
  end
  local quota = math.min(left, (troubled and 1 or tonumber(ARGV[2])) - (under_way[endpoint] or 0))
  if troubled then
    quota = math.min(quota, left_for_trouble)
  end
  local got = 0
  if quota > 0 then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', whole(now), 'LIMIT', 0, quota)) do
      got = got + (take(id, endpoint) and 1 or 0)
    end
  end
  left = left - got
  if troubled and got > 0 then
    left_for_trouble = left_for_trouble - 1
    hold = now + ARGV[4]
    redis.call('HSET', hash, 'hold', whole(hold))
  end
  look_when_due(endpoint, math.max(hold, now + LOOK_AGAIN))
end

for _, endpoint in ipairs(redis.call('ZRANGEBYSCORE', ENDPOINTS, '-inf', whole(now), 'LIMIT', 0, PAGE)) do
  if left <= 0 then
    break
  end
  serve(endpoint)
end
local first = redis.call('ZRANGE', ENDPOINTS, 0, 0, 'WITHSCORES')
return {first[1] and math.max(0, tonumber(first[2]) - now) or -1, unpack(taken)}
