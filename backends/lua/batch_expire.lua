-- A batch's time is up: nothing more of it runs.
-- KEYS    (none)
-- ARGV    1 batch
-- returns 1; 0: its time is not up, or it is on its way out
local is = redis.call('HMGET', BATCH, 'status', 'closing', 'expires_at')
if (is[1] ~= 'validating' and is[1] ~= 'in_progress') or tonumber(is[3]) > tonumber(NOW) then
  return 0
end
if not is[2] then
  redis.call('HSET', BATCH, 'closing', 'expired')
  tell_workers(B)
end
return 1
