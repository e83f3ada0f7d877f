-- Jobs whose time has come: cancelled, expired, or to be looked at again. Of each what is needed to end it.
-- KEYS    1 due jobs (sorted set)
-- ARGV    1 how many at most   2 a job's state key with %s for its id   3 a worker's key likewise
--         4 how many fields, then the fields, then job ids; none: those that are due
-- returns {now (ms), {id, whether a live worker runs it (0|1), values}, ...}
local time = clock()
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local fields = {unpack(ARGV, 5, 4 + ARGV[4])}
local jobs = {unpack(ARGV, 5 + ARGV[4])}
if not jobs[1] then
  jobs = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
end
local found = {now}
for _, id in ipairs(jobs) do
  local state = string.format(ARGV[2], id)
  local worker = redis.call('HGET', state, 'worker')
  local owned = worker and redis.call('EXISTS', string.format(ARGV[3], worker)) or 0
  found[#found + 1] = {id, owned, redis.call('HMGET', state, unpack(fields))}
end
return found
