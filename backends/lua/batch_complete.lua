-- Make a batch final: its files stand.
-- KEYS    (none)
-- ARGV    1 batch   2 the token of batch_begin_finalize   3 how long keys live on (ms)   4 output   5 errors   6 manifest:
--         names of objects, or ''
-- returns its status; false: it is not the caller's to make final
local AFTER = {finalizing = 'completed', cancelling = 'cancelled'}
local is = redis.call('HMGET', BATCH, 'status', 'closing', 'finalizer')
if FINAL[is[1]] and is[3] == ARGV[2] then  -- said before
  return is[1]
end
if is[3] ~= ARGV[2] then
  return false
end
for i, name in ipairs({'output', 'error_output', 'manifest'}) do
  if ARGV[3 + i] ~= '' then
    redis.call('HSET', BATCH, name, ARGV[3 + i])
  end
end
redis.call('HSET', BATCH, 'until', string.format('%.0f', NOW_MS + ARGV[3]))
redis.call('HDEL', BATCH, 'paused', 'trouble', 'trouble_at')
become(is[2] or AFTER[is[1]])
redis.call('ZREM', DUE, B)
keep(BATCH, ROWS, OBJECTS, SEGMENTS, ERRORS, STOPPED, EVENTS)
return redis.call('HGET', BATCH, 'status')
