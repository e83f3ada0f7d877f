-- A worker's heartbeat.
-- KEYS    1 workers (sorted set)   2 this worker   3 models (hash)
-- ARGV    1 worker id   2 alive for (ms)   3 its description   4... model, description, ...
-- returns 1
local time = clock()
local now = tonumber(time[1]) + time[2] / 1000000
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.3f', now))
redis.call('ZADD', KEYS[1], string.format('%.3f', now + ARGV[2] / 1000), ARGV[1])
redis.call('HSET', KEYS[3], unpack(ARGV, 4))
return 1
