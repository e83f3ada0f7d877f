-- Ids of batches, the newest first.
-- KEYS    1 batches (sorted set)
-- ARGV    1 begin behind this one, or ''   2 how many
-- returns {id, ...}
local start = 0
if ARGV[1] ~= '' then
  local rank = redis.call('ZREVRANK', KEYS[1], ARGV[1])
  if not rank then
    return {}
  end
  start = rank + 1
end
return redis.call('ZREVRANGE', KEYS[1], start, start + ARGV[2] - 1)
