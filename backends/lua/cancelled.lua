-- Which of these jobs were asked to stop.
-- KEYS    state hashes
-- returns their positions (1, 2, ...)
local asked = {}
for job, state in ipairs(KEYS) do
  if redis.call('HEXISTS', state, 'cancel') == 1 then
    asked[#asked + 1] = job
  end
end
return asked
