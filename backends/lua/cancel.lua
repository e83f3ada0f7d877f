-- Ask for a job to be stopped. The flag counts; the announcements make it quick: one for the worker that runs the
-- job, one for the keeper, which ends it if nobody does.
-- KEYS    1 state hash   2 due jobs (sorted set)
-- ARGV    1 job id   2 start of the control channel's name   3 model, or '' for the one in the state
--         4 the keeper's channel
-- returns the job's state; false if it is unknown
local is = redis.call('HMGET', KEYS[1], 'state', 'model')
if is[1] ~= 'queued' and is[1] ~= 'running' then
  return is[1]
end
local time = clock()
redis.call('HSET', KEYS[1], 'cancel', '1')
redis.call('ZADD', KEYS[2], string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), ARGV[1])
local model = ARGV[3] ~= '' and ARGV[3] or is[2]
if model then
  redis.call('PUBLISH', ARGV[2] .. model, 'cancel ' .. ARGV[1])
end
redis.call('PUBLISH', ARGV[4], 'due ' .. ARGV[1])
return is[1]
