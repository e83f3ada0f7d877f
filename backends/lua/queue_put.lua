-- Accept a message at the end of its tenant's list, and ring the bell.
-- KEYS    (none: they follow from queue and tenant)
-- ARGV    1 queue   2 tenant   3 base of its tags   4 payload   5 ms after which an unused queue goes, or ''
-- returns messages waiting for this tenant
local queue, tenant = ARGV[1], ARGV[2]
local list = string.format(MESSAGES, queue, tenant)
local waiting = redis.call('LPUSH', list, ARGV[3] .. '#0\n' .. ARGV[4])
join(queue, tenant, 0)
if ARGV[5] ~= '' then
  redis.call('PEXPIRE', list, ARGV[5])
  redis.call('PEXPIRE', string.format(TENANTS, queue), ARGV[5])
end
ring(queue)
return waiting
