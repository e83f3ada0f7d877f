-- Let a batch whose segments were all validated run, or fail, or stop because too many rows were refused.
-- KEYS    (none)
-- ARGV    1 batch   2 '1' to fail if its input has problems   3 how long keys of a failed one live on (ms)
-- returns its status; false: unknown
local is = redis.call('HMGET', BATCH, 'status', 'unvalidated', 'problems', 'closing')
if is[1] ~= 'validating' or tonumber(is[2]) > 0 or is[4] then
  return is[1]
end
local segments = redis.call('HKEYS', SEGMENTS)
if ARGV[2] == '1' and tonumber(is[3]) > 0 then
  for _, seg in ipairs(segments) do
    redis.call('HSET', state_of(seg), 'state', 'cancelled')
  end
  redis.call('HSET', BATCH, 'until', string.format('%.0f', NOW_MS + ARGV[3]))
  become('failed')
  redis.call('DEL', UNSENT)
  redis.call('ZREM', DUE, B)
  keep(BATCH, ROWS, OBJECTS, SEGMENTS, ERRORS, STOPPED)
  return 'failed'
end
if stop_if_too_many_failed() then  -- rows that were refused count, too
  return 'cancelling'
end
for _, seg in ipairs(segments) do
  needs_message(seg)
end
keep(UNSENT)
become('in_progress')
wake_keeper()
finish_if_whole()
return redis.call('HGET', BATCH, 'status')
