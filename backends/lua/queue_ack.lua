-- Forget claims: their messages are done with.
-- KEYS    (none)
-- ARGV    tags
-- returns for each tag 1, or 0 if it was spent
local done = {}
for i, tag in ipairs(ARGV) do
  redis.call('ZREM', EXPIRY, tag)
  done[i] = redis.call('HDEL', CLAIMS, tag)
end
return done
