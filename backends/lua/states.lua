-- The states of many jobs at once.
-- KEYS     each job's state hash
-- ARGV     none
-- returns  for each key the state's name, or false: nothing is known of the job
local found = {}
for i, key in ipairs(KEYS) do found[i] = redis.call('HGET', key, 'state') end
return found
