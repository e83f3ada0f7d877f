-- Segments that need a message, should have one, and are run by nobody who lives.
-- KEYS    (none)
-- ARGV    1 batch
-- returns {segment, its last attempt, ...}
local status, found = redis.call('HGET', BATCH, 'status'), {}
if status ~= 'validating' and status ~= 'in_progress' then
  return found
end
for _, seg in ipairs(redis.call('HKEYS', SEGMENTS)) do
  local is = redis.call('HMGET', state_of(seg), 'state', 'attempt', 'worker', 'validated')
  local rests = ENDED[is[1]] or (status == 'validating' and is[4])
  local runs = is[1] == 'running' and is[3] and redis.call('EXISTS', string.format(WORKER, is[3])) == 1
  if not rests and not runs and not redis.call('ZSCORE', UNSENT, seg) then
    found[#found + 1] = seg
    found[#found + 1] = is[2] or '0'
  end
end
return found
