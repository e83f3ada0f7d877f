-- A segment's rows were looked at. With the last segment the keeper decides what becomes of the batch.
-- KEYS    (none)
-- ARGV    1 batch   2 segment   3 attempt   4 valid rows   5 their prompts' tokens   6 problems   7 how many are told
--         8... problems as JSON
-- returns 1; 0 if it is not this attempt's to say
local state = state_of(ARGV[2])
local is = redis.call('HMGET', state, 'attempt', 'validated')
if is[1] == ARGV[3] and is[2] then  -- said before
  return 1
end
if not owns(ARGV[2], ARGV[3]) then
  return 0
end
redis.call('HSET', state, 'state', 'queued', 'validated', '1', 'attempts', 0)  -- of those at running it
redis.call('HDEL', state, 'worker')
redis.call('HINCRBY', BATCH, 'validated', ARGV[4])
redis.call('HINCRBY', BATCH, 'planned_tokens', ARGV[5])
redis.call('HINCRBY', BATCH, 'problems', ARGV[6])
if ARGV[8] then
  for i = 8, #ARGV do  -- one by one: Lua unpacks no more than 8,000
    redis.call('RPUSH', ERRORS, ARGV[i])
  end
  redis.call('LTRIM', ERRORS, 0, ARGV[7] - 1)
  keep(ERRORS)
end
tell(string.format('{"kind":"validated","segment":"%s","rows":%s,"problems":%s,"at":%s}', ARGV[2], ARGV[4], ARGV[6], NOW))
if redis.call('HINCRBY', BATCH, 'unvalidated', -1) == 0 then
  wake_keeper()
end
return 1
