-- A worker leaves. Its models stay known.
-- KEYS    1 workers (sorted set)   2 this worker
-- ARGV    1 worker id
-- returns 1
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return 1
