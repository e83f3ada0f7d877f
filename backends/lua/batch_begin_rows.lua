-- Begin to run rows of a segment: their logs get their first entries of this attempt.
-- KEYS    (none)
-- ARGV    1 batch   2 segment   3 attempt   4 worker id as JSON   5... lines
-- returns {log before this attempt, ...}; false: fenced
-- A call whose reply was lost may be repeated.
if not owns(ARGV[2], ARGV[3]) then
  return false
end
local first = ARGV[3] .. '-0'
local event = '{"kind":"started","worker":' .. ARGV[4] .. ',"at":' .. NOW .. '}'
local logs = {}
for i = 5, #ARGV do
  local log = log_of(ARGV[i])
  local entries = redis.call('EXISTS', log) == 1 and redis.call('XRANGE', log, '-', '(' .. first) or {}
  local top = redis.call('XREVRANGE', log, '+', first, 'COUNT', 1)[1]
  if not top then
    redis.call('XADD', log, first, 'd', event)
    redis.call('PUBLISH', log, first .. ' ' .. event)
    keep(log)
  end
  logs[#logs + 1] = entries
end
return logs
