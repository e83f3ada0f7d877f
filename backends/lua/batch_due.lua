-- Batches that need a keeper.
-- KEYS    1 due batches (sorted set)
-- ARGV    1 how many   2 a batch's key with %s for its id   3 that of its unsent segments   4 that of its segments
--         5 a segment's state   6 a worker   7 how many fields, then the fields: status, closing, ...
-- returns {now (ms), {id, values, unsent segments, segments that live workers run, if it is to stop}, ...}
local time = clock()
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = {now}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local running, values = 0, redis.call('HMGET', string.format(ARGV[2], id), unpack(ARGV, 8))
  local stops = values[1] == 'cancelling' or values[2]  -- else nobody asks, and there may be thousands
  for _, seg in ipairs(stops and redis.call('HKEYS', string.format(ARGV[4], id)) or {}) do
    local is = redis.call('HMGET', string.format(ARGV[5], seg), 'state', 'worker')
    if is[1] == 'running' and is[2] and redis.call('EXISTS', string.format(ARGV[6], is[2])) == 1 then
      running = running + 1
    end
  end
  found[#found + 1] = {id, values, redis.call('ZCARD', string.format(ARGV[3], id)), running}
end
return found
