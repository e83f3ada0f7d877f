-- Throw away waiting messages of jobs that have ended: cancelled or expired in the queue, say. A claim would find
-- that out too, but there may be nobody to claim. Those of failed jobs stay: whoever claims one knows whether it
-- belongs among the dead letters. Looks at a few of one tenant's messages, the oldest first.
-- KEYS    (none)
-- ARGV    1 queue   2 which tenant (0, 1, ...)   3 how many of its oldest to pass over   4 how many to look at
--         5 how many bytes to look at   6 a job's state key with %s for its id
-- returns {messages thrown away, where to go on: tenant, messages to pass over}; tenant -1: there is no such one
local ENDED = {succeeded = true, cancelled = true, expired = true}

local tenants = string.format(TENANTS, ARGV[1])
local tenant = redis.call('ZRANGE', tenants, ARGV[2], ARGV[2])[1]
if not tenant then
  return {0, -1, 0}
end
local list = string.format(MESSAGES, ARGV[1], tenant)
local start, looked, bytes, gone = tonumber(ARGV[3]), 0, 0, 0
while looked < tonumber(ARGV[4]) and bytes < tonumber(ARGV[5]) do
  local entry = redis.call('LINDEX', list, -1 - start)
  if not entry then
    if redis.call('EXISTS', list) == 1 then
      return {gone, ARGV[2] + 1, 0}
    end
    redis.call('ZREM', tenants, tenant)
    if redis.call('EXISTS', tenants) == 0 then
      redis.call('DEL', string.format(PAST, ARGV[1]))
    end
    return {gone, tonumber(ARGV[2]), 0}
  end
  looked, bytes = looked + 1, bytes + #entry
  local job = task_of(entry)
  if job and ENDED[redis.call('HGET', string.format(ARGV[6], job), 'state')] then
    gone = gone + redis.call('LREM', list, -1, entry)
  else
    start = start + 1
  end
end
return {gone, tonumber(ARGV[2]), start}
