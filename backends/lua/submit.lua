-- Record a job as queued, unless it is known.
-- KEYS    1 state hash
-- ARGV    1 digest of the body   2 keys live until (unix ms)   3... field, value, ... of the state
-- returns 1 recorded; 0 known already; -1 known with another body
local known = redis.call('HMGET', KEYS[1], 'state', 'digest')
if known[2] then
  return known[2] == ARGV[1] and 0 or -1
end
redis.call('HSET', KEYS[1], 'digest', ARGV[1], unpack(ARGV, 3))
if known[1] then  -- a worker claimed it before its record came: keep what the worker wrote
  return 0
end
redis.call('HSET', KEYS[1], 'state', 'queued')
redis.call('PEXPIREAT', KEYS[1], ARGV[2])
return 1
