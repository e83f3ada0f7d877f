-- Whose messages are claimed: a page of the claims of all queues.
-- KEYS    (none)
-- ARGV    1 queue   2 cursor: where the page before ended; 0: begin   3 how many to look at, about
-- returns {cursor, id of a task, ...}; cursor 0: that was the end
local page = redis.call('HSCAN', CLAIMS, ARGV[2], 'COUNT', ARGV[3])
local found, mine = {page[1]}, ARGV[1] .. '\n'
for at = 2, #page[2], 2 do
  local claim = page[2][at]
  if string.sub(claim, 1, #mine) == mine then
    found[#found + 1] = task_of(claim)
  end
end
return found
