-- Not a script: stands in front of those that deal with batches, behind clock.lua and outbox.lua. Their first argument is the
-- batch's id; names of keys follow from it.
local B = ARGV[1]
local BATCH, ROWS, OBJECTS = string.format('{batch}', B), string.format('{rows}', B), string.format('{objects}', B)
local SEGMENTS, UNSENT, STOPPED = string.format('{segments}', B), string.format('{unsent}', B), string.format('{stopped}', B)
local ERRORS, EVENTS = string.format('{errors}', B), string.format('{events}', B)
local STATE, LOG, WORKER, CONTROL = '{state}', '{log}', '{worker}', '{control}'
local BATCHES, DUE, KEEPER = '{batches}', '{due}', '{keeper}'
local FINAL = {completed = true, failed = true, expired = true, cancelled = true}
local MOST_METADATA = 15000
local SENDER_MS = 30000  -- a client that has said nothing for so long sends no more messages
local ENDED = {succeeded = true, failed = true, cancelled = true, expired = true}

local TIME = clock()
local NOW = string.format('%d.%06d', TIME[1], TIME[2])
local NOW_MS = TIME[1] * 1000 + math.floor(TIME[2] / 1000)

local function state_of(segment)
  return string.format(STATE, segment)
end

local function log_of(line)
  return string.format(LOG, B .. '.' .. line)
end

-- Keys live as long as the batch: call it for every key after it may have been made.
local function keep(...)
  local until_ms = redis.call('HGET', BATCH, 'until')
  for _, key in ipairs({...}) do
    redis.call('PEXPIREAT', key, until_ms)
  end
end

local function tell(event)
  local id = redis.call('XADD', EVENTS, '*', 'd', event)
  redis.call('PUBLISH', EVENTS, id .. ' ' .. event)
  keep(EVENTS)
end

local function wake_keeper()
  redis.call('ZADD', DUE, string.format('%.0f', NOW_MS), B)
  redis.call('PUBLISH', KEEPER, 'due ' .. B)
end

-- To the workers that may run rows of it; `id`: the batch, or a row.
local function tell_workers(id)
  redis.call('PUBLISH', string.format(CONTROL, redis.call('HGET', BATCH, 'model')), 'cancel ' .. id)
end

local function tell_status()
  local is = redis.call('HMGET', BATCH, 'status', 'paused', 'reason')
  tell(string.format('{"kind":"status","status":"%s"%s%s,"at":%s}', is[1], is[2] and ',"paused":true' or '',
    is[3] and ',"reason":' .. is[3] or '', NOW))
end

-- A message for it; one that was sent before somebody asked for this one does not count.
local function needs_message(segment)
  redis.call('ZADD', UNSENT, redis.call('HINCRBY', BATCH, 'asked', 1), segment)
end

-- Queue the event for the batch's webhook, if it has one. `part`: which of several of a kind.
local function tell_webhook(kind, status, part)
  local is = redis.call('HMGET', BATCH, 'webhook', 'created_at', 'spec', 'reason', 'output', 'error_output')
  if not is[1] then
    return
  end
  local n = {}
  for i, count in ipairs(redis.call('HMGET', BATCH, 'total', 'completed', 'failed', 'prompt_tokens',
      'completion_tokens', 'cached_tokens')) do
    n[i] = tonumber(count or 0)
  end
  local data = {
    id = B, status = status, output = is[5] or nil, error_output = is[6] or nil,
    reason = is[4] and cjson.decode(is[4]) or nil,
    request_counts = {total = n[1], completed = n[2], failed = n[3]},
    usage = {prompt_tokens = n[4], completion_tokens = n[5], cached_tokens = n[6], total_tokens = n[4] + n[5]},
  }
  local metadata = cjson.decode(is[3]).metadata
  if metadata and #cjson.encode(metadata) < MOST_METADATA then
    data.metadata = metadata
  end
  put_event(event_id(kind, B, is[2], part or ''), 'batch.' .. kind, is[1], cjson.encode(data))
end

local function become(status)
  if FINAL[status] or (status == 'in_progress' and redis.call('HEXISTS', BATCH, 'webhook_every') == 1) then
    tell_webhook(status, status)  -- first: nothing becomes final without its event
  end
  redis.call('HSET', BATCH, 'status', status, status .. '_at', NOW)
  tell_status()
end

-- Every so many percent of its rows, if somebody wants to know. All of them is for the end to tell.
local function tell_progress()
  local is = redis.call('HMGET', BATCH, 'webhook_every', 'total', 'completed', 'failed', 'webhook_told', 'status')
  if not is[1] or is[6] ~= 'in_progress' then
    return
  end
  local percent = math.floor(100 * (is[3] + is[4]) / is[2])
  local step = percent - percent % is[1]
  if step > tonumber(is[5] or 0) and percent < 100 then
    redis.call('HSET', BATCH, 'webhook_told', step)
    tell_webhook('progress', is[6], step)
  end
end

-- Whether the segment is this attempt's to write for.
local function owns(segment, attempt)
  local is = redis.call('HMGET', state_of(segment), 'state', 'attempt')
  return is[1] == 'running' and is[2] == attempt
end

-- All rows have ended: the rest is the keeper's.
local function finish_if_whole()
  local is = redis.call('HMGET', BATCH, 'status', 'total', 'completed', 'failed', 'closing')
  if tonumber(is[3]) + tonumber(is[4]) < tonumber(is[2]) then
    return
  end
  if is[1] == 'in_progress' and not is[5] then
    become('finalizing')
  end
  if is[1] ~= 'validating' then
    wake_keeper()
  end
end

-- As many rows have failed as it was to bear: it stops. Returns whether it does.
local function stop_if_too_many_failed()
  local is = redis.call('HMGET', BATCH, 'stop_after', 'failed')
  local most = tonumber(is[1] or '')
  if not most or tonumber(is[2]) < most then
    return false
  end
  redis.call('HSET', BATCH, 'reason', string.format('{"code":"too_many_failed","message":"%s rows failed, and the '
    .. 'batch was to stop at %d"}', is[2], most))
  become('cancelling')
  wake_keeper()
  tell_workers(B)
  return true
end

