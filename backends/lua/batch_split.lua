-- Give unstarted rows of a segment away, as a segment of their own.
-- KEYS    (none)
-- ARGV    1 batch   2 segment   3 attempt   4 what it is made of from now on   5 the new segment   6 what that is made of
-- returns 1; 0 if it is not this attempt's to give
if redis.call('HEXISTS', SEGMENTS, ARGV[5]) == 1 then  -- said before
  return 1
end
if not owns(ARGV[2], ARGV[3]) then
  return 0
end
redis.call('HSET', SEGMENTS, ARGV[2], ARGV[4], ARGV[5], ARGV[6])
-- A later attempt than any that may have written its rows' logs.
redis.call('HSET', state_of(ARGV[5]), 'state', 'queued', 'attempt', ARGV[3], 'validated', '1')
needs_message(ARGV[5])
redis.call('HINCRBY', BATCH, 'segments', 1)
keep(SEGMENTS, UNSENT, state_of(ARGV[5]))
wake_keeper()
return 1
