-- Hand a running job back to the queue.
-- KEYS    1 state hash
-- ARGV    1 attempt
-- returns 1; 0 if the job is not this attempt's any more
local is = redis.call('HMGET', KEYS[1], 'state', 'attempt')
if is[1] ~= 'running' or is[2] ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('HDEL', KEYS[1], 'worker')
return 1
