-- Where one row stands.
-- KEYS    (none)
-- ARGV    1 batch   2 line   3 how many log entries
-- returns {status, whether the row has ended (0|1), whether it was cancelled (0|1), description, expires_at,
--          first and last log entries}; false: no such batch
local is = redis.call('HMGET', BATCH, 'status', 'spec', 'expires_at', 'created_at')
if not is[1] then
  return false
end
local log = log_of(ARGV[2])
return {is[1], redis.call('GETBIT', ROWS, ARGV[2]), redis.call('SISMEMBER', STOPPED, ARGV[2]), is[2], is[3], is[4],
  redis.call('XREVRANGE', log, '+', '-', 'COUNT', ARGV[3])}
