-- Forget a batch.
-- KEYS    (none)
-- ARGV    1 batch
-- returns 1; 0: unknown
for _, seg in ipairs(redis.call('HKEYS', SEGMENTS)) do
  redis.call('DEL', state_of(seg))
end
redis.call('ZREM', BATCHES, B)
redis.call('ZREM', DUE, B)
return redis.call('DEL', BATCH, ROWS, OBJECTS, SEGMENTS, UNSENT, STOPPED, ERRORS, EVENTS) > 0 and 1 or 0
