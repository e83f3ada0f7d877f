-- Whose messages wait: the tasks' ids in a page of one tenant's list, from the end where messages come in, so that
-- those that are taken meanwhile move nothing.
-- KEYS    (none)
-- ARGV    1 queue   2 tenant   3 how many of the newest to pass over   4 how many to look at   5 how many bytes
-- returns {messages looked at, id, ...}; 0: that was the end
local CHUNK = 20
local list, start = string.format(MESSAGES, ARGV[1], ARGV[2]), tonumber(ARGV[3])
local found, looked, bytes = {0}, 0, 0
while looked < tonumber(ARGV[4]) and bytes < tonumber(ARGV[5]) do
  local entries = redis.call('LRANGE', list, start + looked, start + looked + CHUNK - 1)
  for _, entry in ipairs(entries) do
    found[#found + 1] = task_of(entry)
    bytes = bytes + #entry
  end
  looked = looked + #entries
  if #entries < CHUNK then
    break
  end
end
found[1] = looked
return found
