-- Segments have their messages.
-- KEYS    (none)
-- ARGV    1 batch   2... id of a segment, and the mark that it had when its message was sent
-- returns how many needed one. What has asked for another meanwhile still needs that.
local known = 0
for i = 2, #ARGV, 2 do
  if redis.call('ZSCORE', UNSENT, ARGV[i]) == ARGV[i + 1] then
    known = known + redis.call('ZREM', UNSENT, ARGV[i])
  end
end
return known
