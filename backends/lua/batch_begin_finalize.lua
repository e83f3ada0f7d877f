-- Begin to make a batch final: from here on no worker can add to it.
-- KEYS    (none)
-- ARGV    1 batch   2 a token of the caller's own   3 for how long (ms)
-- returns its status, or 'expired' if that is what it becomes; false: it is not ready for that, or somebody else does it
local is = redis.call('HMGET', BATCH, 'status', 'closing', 'finalizer', 'finalizer_until')
local ready = is[1] == 'finalizing' or is[1] == 'cancelling' or (is[2] and not FINAL[is[1]])
if not ready or (is[3] and is[3] ~= ARGV[2] and tonumber(is[4]) > NOW_MS) then
  return false
end
redis.call('HSET', BATCH, 'finalizer', ARGV[2], 'finalizer_until', string.format('%.0f', NOW_MS + ARGV[3]))
for _, seg in ipairs(redis.call('HKEYS', SEGMENTS)) do
  local state = state_of(seg)
  if not ENDED[redis.call('HGET', state, 'state')] then
    redis.call('HSET', state, 'state', 'cancelled')
    redis.call('HDEL', state, 'worker')
    keep(state)
  end
end
redis.call('DEL', UNSENT)
return is[2] or is[1]
