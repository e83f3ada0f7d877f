-- Take events whose time has come. Whoever takes one and dies has it come again when its lease is over.
-- ARGV    1 how many   2 how many to one host are under way at most   3 how many for endpoints in trouble
--         4 lease (ms)   5 give an event up after (ms)
--         6... endpoint or '//' and host, how many the caller has under way, ...
-- returns {ms until the next one, or -1,
--          {id, type, url, data, at (ms), tries with this one, step, endpoint, '//' and host}, ...}
--
-- An endpoint in trouble gets one event at a time. An endpoint or a host that cannot be served now is put off a
-- little, so that those behind it are seen; the end of one of its tries brings it back at once.
local LOOK_AGAIN, PAGE, BURY = 200, 200, 100

local now, left, left_for_trouble = now_ms(), tonumber(ARGV[1]), tonumber(ARGV[3])
local under_way, taken = {}, {}
for at = 6, #ARGV, 2 do
  under_way[ARGV[at]] = tonumber(ARGV[at + 1])
end

-- False: it has ended.
local function take(id, endpoint, host)
  local event = string.format(EVENT, id)
  local is = redis.call('HMGET', event, 'type', 'url', 'data', 'at', 'step', 'since', 'state')
  if is[7] ~= 'pending' then  -- its record is gone
    redis.call('ZREM', string.format(QUEUE, endpoint), id)
    redis.call('ZREM', PENDING, id)
    return false
  elseif now - (tonumber(is[6] or '') or now) > tonumber(ARGV[5]) then
    end_event(id, endpoint, 'failed', 'gave_up', now)
    return false
  elseif is[2] and redis.call('HEXISTS', string.format(ENDPOINT, endpoint), gone_field(is[2])) == 1 then
    end_event(id, endpoint, 'failed', 'endpoint_disabled', now)
    return false
  end
  local tries = redis.call('HINCRBY', event, 'tries', 1)
  redis.call('ZADD', string.format(QUEUE, endpoint), whole(now + ARGV[4]), id)
  taken[#taken + 1] = {id, is[1], is[2], is[3], is[4], tries, is[5], endpoint, '//' .. host}
  return true
end

-- Take at most `free` events of an endpoint. Returns how many.
local function serve(endpoint, host, free)
  local hash, queue = string.format(ENDPOINT, endpoint), string.format(QUEUE, endpoint)
  local is = redis.call('HMGET', hash, 'failures', 'hold', 'retry_at')
  local hold, troubled = math.max(is[2] or 0, is[3] or 0), tonumber(is[1] or 0) >= TROUBLE
  if hold > now then
    look_at_endpoint(endpoint, host, hold)
    return 0
  end
  local quota = math.min(left, free)
  if troubled then
    quota = math.min(quota, left_for_trouble, 1 - (under_way[endpoint] or 0))
  end
  local got, ended = 0, 0
  while got < quota and ended < BURY do
    local id = redis.call('ZRANGEBYSCORE', queue, '-inf', whole(now), 'LIMIT', 0, 1)[1]
    if not id then
      break
    elseif take(id, endpoint, host) then
      got = got + 1
    else
      ended = ended + 1
    end
  end
  left = left - got
  if troubled and got > 0 then
    left_for_trouble = left_for_trouble - 1
    hold = now + ARGV[4]
    redis.call('HSET', hash, 'hold', whole(hold))
  end
  look_at_endpoint(endpoint, host, math.max(hold, now + (quota <= 0 and LOOK_AGAIN or 0)))
  return got
end

for _, host in ipairs(redis.call('ZRANGEBYSCORE', HOSTS, '-inf', whole(now), 'LIMIT', 0, PAGE)) do
  if left <= 0 then
    break
  end
  local free, endpoints = ARGV[2] - (under_way['//' .. host] or 0), string.format(HOST, host)
  for _, endpoint in ipairs(redis.call('ZRANGEBYSCORE', endpoints, '-inf', whole(now), 'LIMIT', 0, PAGE)) do
    if left <= 0 or free <= 0 then
      break
    end
    free = free - serve(endpoint, host, free)
  end
  look_at_host(host, now + (free <= 0 and LOOK_AGAIN or 0))
end
local first = redis.call('ZRANGE', HOSTS, 0, 0, 'WITHSCORES')
return {first[1] and math.max(0, tonumber(first[2]) - now) or -1, unpack(taken)}
