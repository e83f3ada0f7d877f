-- Forget workers whose heartbeat ended: others do so with their own, and the last one to go has no others.
-- KEYS    1 workers (sorted set)
-- returns how many there were
local time = clock()
return redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%d.%06d', time[1], time[2]))
