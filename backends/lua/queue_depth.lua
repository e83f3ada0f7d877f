-- Count what waits.
-- KEYS    (none)
-- ARGV    1 queue
-- returns messages waiting, over all tenants
local waiting = 0
for _, tenant in ipairs(redis.call('ZRANGE', string.format(TENANTS, ARGV[1]), 0, -1)) do
  waiting = waiting + redis.call('LLEN', string.format(MESSAGES, ARGV[1], tenant))
end
return waiting
