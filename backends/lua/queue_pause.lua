-- Stop claims from a queue, or let them go on and ring the bell.
-- KEYS    (none)
-- ARGV    1 queue   2 '1' to pause
-- returns 1 if that was a change
local flags = string.format(FLAGS, ARGV[1])
if ARGV[2] == '1' then
  return redis.call('HSET', flags, 'paused', '1')
end
local changed = redis.call('HDEL', flags, 'paused')
ring(ARGV[1])
return changed
