-- Whose messages are claimed.
-- KEYS    (none)
-- ARGV    1 queue
-- returns {id of a task, ...}
local found, mine = {}, ARGV[1] .. '\n'
for _, claim in ipairs(redis.call('HVALS', CLAIMS)) do
  if string.sub(claim, 1, #mine) == mine then
    found[#found + 1] = task_of(claim)
  end
end
return found
