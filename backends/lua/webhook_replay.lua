-- Send events again, from the first step on; those that wait are tried now. One that is under way is left alone.
-- ARGV    ids
-- returns those that are known
local known, now = {}, now_ms()
for _, id in ipairs(ARGV) do
  local event = string.format(EVENT, id)
  local is = redis.call('HMGET', event, 'state', 'endpoint', 'next', 'url')
  if is[1] then
    known[#known + 1] = id
    if is[1] ~= 'pending' or tonumber(is[3]) > now then
      redis.call('HSET', event, 'state', 'pending', 'step', 0, 'since', whole(now), 'next', whole(now))
      redis.call('HDEL', event, 'ended', 'why')
      redis.call('ZREM', DELIVERED, id)
      redis.call('ZREM', FAILED, id)
      redis.call('HDEL', string.format(ENDPOINT, is[2]), 'hold', 'retry_at')
      make_pending(id, is[2], is[4], now)
    end
  end
end
return known
