-- Make a job final: state, end event, expiry, and the event for its webhook in the same step. The result object stands already; whoever finds it may call this.
-- KEYS    1 state hash   2 log   3 due jobs (sorted set)
-- ARGV    1 final state   2 end event   3 keys live on (ms)   4 the result itself, or ''   5 job id
--         6 type of the webhook's event   7 its data
-- returns 1; 0 if the job was final already
local FINAL = {succeeded = true, failed = true, cancelled = true, expired = true}
redis.call('ZREM', KEYS[3], ARGV[5])
local was = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'webhook', 'submitted_at')
if FINAL[was[1]] then
  return 0
end

if was[3] then  -- first, so that whatever fails here leaves nothing final without its event
  put_event(event_id(ARGV[6], ARGV[5], was[4] or '', ''), ARGV[6], was[3], ARGV[7])
end
local time = clock()
local attempt, seq = tonumber(was[2] or '0'), 1
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if top then
  local owner, last = string.match(top[1], '^(%d+)%-(%d+)$')
  if tonumber(owner) >= attempt then
    attempt, seq = tonumber(owner), tonumber(last) + 1
  end
elseif attempt == 0 then  -- it ends without ever having been claimed
  attempt = time[1] * 1000 + math.floor(time[2] / 1000)
end

local id = string.format('%.0f-%d', attempt, seq)
redis.call('XADD', KEYS[2], id, 'd', ARGV[2])
redis.call('HSET', KEYS[1], 'state', ARGV[1], 'end', ARGV[2],
  'finished_at', string.format('%d.%06d', time[1], time[2]))
redis.call('HDEL', KEYS[1], 'worker')
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'result', ARGV[4])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('PUBLISH', KEYS[2], id .. ' ' .. ARGV[2])
return 1
