-- Begin an attempt at a segment: from here on nobody with a lower number can write its rows.
-- KEYS    (none)
-- ARGV    1 batch   2 segment   3 worker id
-- returns {word}: unknown (nothing stands of it), over (it needs nothing more), paused (it gets another message once
--         the batch goes on); else {'validate' or 'run', attempt, attempts, now, batch's description, expires_at,
--         the segment's description, bits of its lines from the first one's byte on, lines that were cancelled}
local seg, state = ARGV[2], state_of(ARGV[2])
local info = redis.call('HGET', SEGMENTS, seg)
local is = redis.call('HMGET', BATCH, 'status', 'closing', 'paused', 'spec', 'expires_at')
if not is[1] or not info then
  return {'unknown'}
end
local mine = redis.call('HMGET', state, 'state', 'attempt', 'validated')
local phase = is[1] == 'validating' and 'validate' or 'run'
local done = ENDED[mine[1]] or (phase == 'validate' and mine[3]) or (is[1] ~= 'validating' and is[1] ~= 'in_progress')
if done then
  return {'over'}
end
if is[2] or tonumber(is[5]) <= tonumber(NOW) then  -- the keeper ends it
  wake_keeper()
  return {'over'}
end
if is[3] then
  redis.call('HSET', state, 'state', 'queued')
  redis.call('HDEL', state, 'worker')
  needs_message(seg)
  keep(state, UNSENT)
  return {'paused'}
end
local attempt = string.format('%.0f', math.max(tonumber(mine[2] or '0') + 1, NOW_MS))
redis.call('HSET', state, 'state', 'running', 'attempt', attempt, 'worker', ARGV[3])
local attempts = redis.call('HINCRBY', state, 'attempts', 1)
keep(state)
local made_of = cjson.decode(info)
local bits = redis.call('GETRANGE', ROWS, math.floor(made_of.first / 8), math.floor(made_of.last / 8))
return {phase, attempt, attempts, NOW, is[4], is[5], info, bits, redis.call('SMEMBERS', STOPPED)}
