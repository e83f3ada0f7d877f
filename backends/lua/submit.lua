-- Record a job as queued, unless it is known. Its time runs from now, by this server's clock.
-- KEYS    1 state hash   2 due jobs (sorted set)
-- ARGV    1 digest of the body   2 how long the job may take (s)   3 how long keys outlive that (ms)   4 job id
--         5... field, value, ... of the state
-- returns 1 recorded; 0 known already; -1 known with another body
local known = redis.call('HMGET', KEYS[1], 'state', 'digest')
if known[2] then
  return known[2] == ARGV[1] and 0 or -1
end
redis.call('HSET', KEYS[1], 'digest', ARGV[1], unpack(ARGV, 5))
if known[1] then  -- a worker claimed it before its record came: keep what the worker wrote
  return 0
end
local time = clock()
local expires_ms = time[1] * 1000 + math.floor(time[2] / 1000) + math.ceil(ARGV[2] * 1000)
redis.call('HSET', KEYS[1], 'state', 'queued', 'expires_at', string.format('%.3f', expires_ms / 1000))
redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', expires_ms + ARGV[3]))
redis.call('ZADD', KEYS[2], string.format('%.0f', expires_ms), ARGV[4])
return 1
