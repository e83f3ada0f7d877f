-- Hand every claim back at once: the caller knows that no owner lives.
-- KEYS    (none)
-- ARGV    (none)
-- returns how many there were
local tags = redis.call('ZRANGE', EXPIRY, 0, -1)
for i = #tags, 1, -1 do
  give_back(tags[i])
end
if #tags > 0 then
  ring('')
end
redis.call('DEL', SWEEP)
return #tags
