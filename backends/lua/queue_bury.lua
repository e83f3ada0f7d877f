-- Put a claimed message that can never be delivered aside, for a person to look at: "<tag>\n<reason>\n<tenant>\n
-- <payload>" in the queue's list of the dead.
-- KEYS    (none)
-- ARGV    1 tag   2 reason   3 how many dead messages a queue keeps
-- returns 1, or 0 if the tag was spent
local claim = redis.call('HGET', CLAIMS, ARGV[1])
redis.call('ZREM', EXPIRY, ARGV[1])
if not claim then
  return 0
end
local queue, rest = string.match(claim, '^([^\n]*)\n(.*)$')
local dead = string.format(DEAD, queue)
redis.call('LPUSH', dead, ARGV[1] .. '\n' .. ARGV[2] .. '\n' .. rest)
redis.call('LTRIM', dead, 0, ARGV[3] - 1)
redis.call('HDEL', CLAIMS, ARGV[1])
return 1
