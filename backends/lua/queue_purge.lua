-- Throw away what waits. Claimed messages stay with their owners.
-- KEYS    (none)
-- ARGV    1 queue
-- returns how many messages there were
local tenants, gone = string.format(TENANTS, ARGV[1]), 0
for _, tenant in ipairs(redis.call('ZRANGE', tenants, 0, -1)) do
  local list = string.format(MESSAGES, ARGV[1], tenant)
  gone = gone + redis.call('LLEN', list)
  redis.call('DEL', list)
end
redis.call('DEL', tenants, string.format(PAST, ARGV[1]))
return gone
