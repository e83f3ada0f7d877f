-- Throw away waiting messages of jobs that have ended: cancelled or expired in the queue, say. A claim would find
-- that out too, but there may be nobody to claim.
-- KEYS    (none)
-- ARGV    1 queue   2 how many of each tenant's oldest to pass over   3 how many to look at then
--         4 a job's state key with %s for its id
-- returns {messages thrown away, messages of the tenant that has most}
local FINAL = {succeeded = true, failed = true, cancelled = true, expired = true}
local tenants, gone, longest = string.format(TENANTS, ARGV[1]), 0, 0
for _, tenant in ipairs(redis.call('ZRANGE', tenants, 0, -1)) do
  local list = string.format(MESSAGES, ARGV[1], tenant)
  local before = gone
  for _, entry in ipairs(redis.call('LRANGE', list, -ARGV[2] - ARGV[3], -1 - ARGV[2])) do
    local job = string.match(entry, '"id": ?"([%w_.-]+)"')  -- in the headers; the body is not plain text
    if job and FINAL[redis.call('HGET', string.format(ARGV[4], job), 'state')] then
      gone = gone + redis.call('LREM', list, -1, entry)
    end
  end
  local left = redis.call('LLEN', list)
  longest = math.max(longest, left)
  if left == 0 and gone > before then
    redis.call('ZREM', tenants, tenant)
  end
end
if gone > 0 and redis.call('EXISTS', tenants) == 0 then
  redis.call('DEL', string.format(PAST, ARGV[1]))
end
return {gone, longest}
