-- Look at a batch again later, unless something has asked for a look since it was seen to be due.
-- KEYS    1 due batches (sorted set)
-- ARGV    1 batch   2 when it was seen to be due (ms)   3 when to look again (ms)
-- returns 1; 0: it is not due any more, or due again
local due = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not due or tonumber(due) >= tonumber(ARGV[2]) then  -- it may have been asked for in the same millisecond
  return 0
end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
return 1
