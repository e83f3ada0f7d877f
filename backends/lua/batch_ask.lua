-- Segments whose messages are lost need others, unless something has been heard of them since.
-- KEYS    (none)
-- ARGV    1 batch   2... id of a segment, and the last attempt at it when its message was missed
-- returns how many need one now
local asked = 0
for i = 2, #ARGV, 2 do
  local is = redis.call('HMGET', state_of(ARGV[i]), 'state', 'attempt')
  if redis.call('HEXISTS', SEGMENTS, ARGV[i]) == 1 and not ENDED[is[1]] and (is[2] or '0') == ARGV[i + 1] then
    needs_message(ARGV[i])
    asked = asked + 1
  end
end
if asked > 0 then
  keep(UNSENT)
  wake_keeper()
end
return asked
