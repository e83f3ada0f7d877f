-- A segment's rows have all ended, or are the keeper's to end.
-- KEYS    (none)
-- ARGV    1 batch   2 segment   3 attempt
-- returns 1; 0 if it is not this attempt's to say
local state = state_of(ARGV[2])
local is = redis.call('HMGET', state, 'state', 'attempt')
if ENDED[is[1]] and is[2] == ARGV[3] then
  return 1
end
if not owns(ARGV[2], ARGV[3]) then
  return 0
end
local status = redis.call('HMGET', BATCH, 'status', 'closing')
local stopped = status[1] == 'cancelling' or status[2]
redis.call('HSET', state, 'state', stopped and 'cancelled' or 'succeeded')
redis.call('HDEL', state, 'worker')
if stopped then
  wake_keeper()
end
return 1
