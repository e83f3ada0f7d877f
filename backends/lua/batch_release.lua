-- Hand a segment back, and say in its running rows' logs that nothing died.
-- KEYS    (none)
-- ARGV    1 batch   2 segment   3 attempt   4 '1' if its message is gone, and a keeper has to send another
--         5... lines of running rows
-- returns 1; 0 if it is not this attempt's any more
if not owns(ARGV[2], ARGV[3]) then
  return 0
end
local event = '{"kind":"released","at":' .. NOW .. '}'
for i = 5, #ARGV do
  local log = log_of(ARGV[i])
  local top = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  local owner, seq = string.match(top and top[1] or '', '^(%d+)%-(%d+)$')
  if owner == ARGV[3] then
    local id = string.format('%s-%d', owner, seq + 1)
    redis.call('XADD', log, id, 'd', event)
    redis.call('PUBLISH', log, id .. ' ' .. event)
  end
end
local state = state_of(ARGV[2])
redis.call('HSET', state, 'state', 'queued')
redis.call('HDEL', state, 'worker')
if ARGV[4] == '1' then
  needs_message(ARGV[2])
  keep(UNSENT)
  wake_keeper()
end
return 1
