-- Count a queue's claimed messages.
-- KEYS    (none)
-- ARGV    1 queue
-- returns how many
local claimed, mine = 0, ARGV[1] .. '\n'
for _, claim in ipairs(redis.call('HVALS', CLAIMS)) do
  if string.sub(claim, 1, #mine) == mine then
    claimed = claimed + 1
  end
end
return claimed
