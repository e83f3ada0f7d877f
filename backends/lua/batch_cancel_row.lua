-- Stop one row.
-- KEYS    (none)
-- ARGV    1 batch   2 line
-- returns 1; 0: it has ended; false: no such batch
local status = redis.call('HGET', BATCH, 'status')
if not status then
  return false
end
if FINAL[status] or redis.call('GETBIT', ROWS, ARGV[2]) == 1 then
  return 0
end
redis.call('SADD', STOPPED, ARGV[2])
keep(STOPPED)
tell_workers(B .. '.' .. ARGV[2])
return 1
