-- What whoever runs rows of a batch must know.
-- KEYS    (none)
-- ARGV    1 batch
-- returns {status, closing, paused, lines that were cancelled}
local is = redis.call('HMGET', BATCH, 'status', 'closing', 'paused')
return {is[1], is[2], is[3], redis.call('SMEMBERS', STOPPED)}
