-- Hand a running job back to the queue, and say in its log that nothing died.
-- KEYS    1 state hash   2 log
-- ARGV    1 attempt
-- returns 1; 0 if the job is not this attempt's any more
local is = redis.call('HMGET', KEYS[1], 'state', 'attempt')
if is[1] ~= 'running' or is[2] ~= ARGV[1] then
  return 0
end
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local owner, seq = string.match(top and top[1] or '', '^(%d+)%-(%d+)$')
if owner == ARGV[1] then
  local time = redis.call('TIME')
  local event = string.format('{"kind":"released","at":%d.%06d}', time[1], time[2])
  local id = string.format('%s-%d', owner, seq + 1)
  redis.call('XADD', KEYS[2], id, 'd', event)
  redis.call('PUBLISH', KEYS[2], id .. ' ' .. event)
end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('HDEL', KEYS[1], 'worker')
return 1
