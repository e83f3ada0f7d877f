-- Push the end of leases out. What has expired but was not swept yet is still its owner's.
-- KEYS    (none)
-- ARGV    1 now (ms; '' = the server's clock)   2 lease (ms)   3… tags
-- returns the tags that are spent
local lost, expires = {}, clock(ARGV[1]) + ARGV[2]
for i = 3, #ARGV do
  -- Removed and added again: a server out of memory refuses a script whose first write may grow, and nothing else.
  if redis.call('ZREM', EXPIRY, ARGV[i]) == 1 then
    redis.call('ZADD', EXPIRY, expires, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
