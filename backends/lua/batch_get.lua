-- All that is known of a batch.
-- KEYS    (none)
-- ARGV    1 batch
-- returns {field, value, ...}, {problem, ...}
return {redis.call('HGETALL', BATCH), redis.call('LRANGE', ERRORS, 0, -1)}
