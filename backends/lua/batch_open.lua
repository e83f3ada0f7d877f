-- Open a batch, unless it is known.
-- KEYS    (none)
-- ARGV    1 batch   2 its description, as JSON   3 model   4 how long it may take (s)   5 how long keys outlive that
--         (ms)   6 rows   7 cancel it after so many failed rows, or ''   8 how many segments   9... id and description
--         of each
-- returns 1 opened; 0 known already; -1 known with another description
local known = redis.call('HGET', BATCH, 'spec')
if known then
  return known == ARGV[2] and 0 or -1
end
local expires_ms = NOW_MS + math.ceil(ARGV[4] * 1000)
redis.call('HSET', BATCH, 'spec', ARGV[2], 'model', ARGV[3], 'status', 'validating', 'created_at', NOW,
  'expires_at', string.format('%.3f', expires_ms / 1000), 'until', string.format('%.0f', expires_ms + ARGV[5]),
  'total', ARGV[6], 'completed', 0, 'failed', 0, 'stop_after', ARGV[7],
  'segments', ARGV[8], 'unvalidated', ARGV[8], 'problems', 0)
local options = cjson.decode(ARGV[2]).options or {}
for name, value in pairs({webhook = options.webhook, webhook_every = options.webhook_every_percent}) do
  redis.call('HSET', BATCH, name, value)
end
for i = 9, #ARGV, 2 do
  redis.call('HSET', SEGMENTS, ARGV[i], ARGV[i + 1])
  needs_message(ARGV[i])
  redis.call('HSET', state_of(ARGV[i]), 'state', 'queued')
  keep(state_of(ARGV[i]))
end
keep(BATCH, SEGMENTS, UNSENT)
redis.call('ZADD', BATCHES, string.format('%.0f', NOW_MS), B)
tell_status()
-- Whoever opens it sends the messages; a keeper sends what is missing.
redis.call('ZADD', DUE, string.format('%.0f', NOW_MS + (ARGV[8] == '0' and 0 or SENDER_MS)), B)
return 1
