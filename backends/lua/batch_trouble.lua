-- A batch cannot be made final until somebody mends what is said here.
-- KEYS    (none)
-- ARGV    1 batch   2 a description, as JSON
-- returns 1; 0: it is final, or unknown
local status = redis.call('HGET', BATCH, 'status')
if not status or FINAL[status] then
  return 0
end
redis.call('HSET', BATCH, 'trouble', ARGV[2], 'trouble_at', NOW)
return 1
