-- Start no more rows, or go on.
-- KEYS    (none)
-- ARGV    1 batch   2 '1' to pause
-- returns its status; false: unknown
local is = redis.call('HMGET', BATCH, 'status', 'paused')
if not is[1] or FINAL[is[1]] or (ARGV[2] == '1') == (is[2] and true or false) then
  return is[1]
end
if ARGV[2] == '1' then
  redis.call('HSET', BATCH, 'paused', '1')
  tell_workers(B)
else
  redis.call('HDEL', BATCH, 'paused')
  wake_keeper()
end
tell_status()
return is[1]
