-- Ask for a job to be stopped. The flag counts; the announcement makes it quick.
-- KEYS    1 state hash
-- ARGV    1 job id   2 start of the control channel's name   3 model, or '' for the one in the state
-- returns the job's state; false if it is unknown
local is = redis.call('HMGET', KEYS[1], 'state', 'model')
if is[1] ~= 'queued' and is[1] ~= 'running' then
  return is[1]
end
redis.call('HSET', KEYS[1], 'cancel', '1')
local model = ARGV[3] ~= '' and ARGV[3] or is[2]
if model then
  redis.call('PUBLISH', ARGV[2] .. model, 'cancel ' .. ARGV[1])
end
return is[1]
