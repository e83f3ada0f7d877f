-- Stop a batch: what has ended stays.
-- KEYS    (none)
-- ARGV    1 batch   2 why, as JSON, or ''
-- returns its status; false: unknown
local is = redis.call('HMGET', BATCH, 'status', 'closing')
if (is[1] ~= 'validating' and is[1] ~= 'in_progress') or is[2] then
  return is[1]
end
if ARGV[2] ~= '' then
  redis.call('HSET', BATCH, 'reason', ARGV[2])
end
become('cancelling')
wake_keeper()
tell_workers(B)
return 'cancelling'
