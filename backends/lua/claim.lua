-- Begin an attempt: from here on nobody with a lower number can write.
-- KEYS    1 state hash   2 log   3 due jobs (sorted set)
-- ARGV    1 worker id   2 the same as JSON   3 expires_at (unix s) if the state was lost
--         4 how long keys outlive it (ms)   5 job id   6, 7 if the state was lost: its webhook, when it was
--         submitted, or ''
-- returns {state} if the job is final, else
--         {'running', attempt, now (unix s), cancelled (0|1), attempts, known (0|1), log before this attempt,
--          expires_at (unix s)}
local FINAL = {succeeded = true, failed = true, cancelled = true, expired = true}
local was = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'cancel', 'expires_at')
if FINAL[was[1]] then
  return {was[1]}
end

local time = clock()
local now = string.format('%d.%06d', time[1], time[2])
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local entries = redis.call('XRANGE', KEYS[2], '-', '+')
local last = tonumber(was[2] or '0')
if #entries > 0 then  -- ahead of the state only if the state was lost
  last = math.max(last, tonumber(string.match(entries[#entries][1], '^%d+')))
end
local attempt = string.format('%.0f', math.max(last + 1, now_ms))

local event = '{"kind":"started","worker":' .. ARGV[2] .. ',"at":' .. now .. '}'
redis.call('XADD', KEYS[2], attempt .. '-0', 'd', event)
redis.call('HSETNX', KEYS[1], 'started_at', now)
redis.call('HSETNX', KEYS[1], 'expires_at', ARGV[3])
for i, name in ipairs({'webhook', 'submitted_at'}) do
  if ARGV[5 + i] ~= '' then
    redis.call('HSETNX', KEYS[1], name, ARGV[5 + i])
  end
end
redis.call('HSET', KEYS[1], 'state', 'running', 'attempt', attempt, 'worker', ARGV[1])
local attempts = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
-- A job claimed after its time still has to be ended: its keys live on from now.
local expires_ms = (was[4] or ARGV[3]) * 1000
redis.call('ZADD', KEYS[3], 'NX', string.format('%.0f', expires_ms), ARGV[5])
local until_ms = math.max(expires_ms, now_ms) + tonumber(ARGV[4])
redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', until_ms))
redis.call('PEXPIREAT', KEYS[2], string.format('%.0f', until_ms))
redis.call('PUBLISH', KEYS[2], attempt .. '-0 ' .. event)
local known = (was[1] or #entries > 0) and 1 or 0
return {'running', attempt, now, was[3] and 1 or 0, attempts, known, entries, was[4] or ARGV[3]}
