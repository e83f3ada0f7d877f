-- Become, or stay, the one who leads.
-- KEYS    1 who leads
-- ARGV    1 a token of the caller's own   2 for how long (ms); 0: no longer
-- returns 1 if the caller leads now
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
