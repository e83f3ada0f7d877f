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
-- A client is at it, unless a keeper has something to do here.
local due = redis.call('ZSCORE', DUE, B)
if due and tonumber(due) > NOW_MS then
  redis.call('ZADD', DUE, 'GT', string.format('%.0f', NOW_MS + SENDER_MS), B)
end
return known
