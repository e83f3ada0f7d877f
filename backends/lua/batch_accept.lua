-- Objects of finished rows join their batch: the only way in. Counts and usage are summed here and nowhere else.
-- KEYS    (none)
-- ARGV    1 batch   2 segment, or ''   3 attempt; without a segment the token of who makes the batch final, or '' for
--         the client, who may speak until it is being made final   4 how many objects, then of each: 5 name
--         6 description as JSON   7 kind: output or errors   8 rows   9, 10, 11 tokens: prompt, completion, cached
--         12 its lines, each as a 4-byte number, high byte first
-- returns {'accepted', completed, failed, status, closing (0|1)}, {'fenced'},
--         or {'refused', line, ...}: these have ended before, and nothing was changed
local seg, attempt = ARGV[2], ARGV[3]
local is = redis.call('HMGET', BATCH, 'status', 'finalizer', 'joined', 'closing')

local function answer()
  local now = redis.call('HMGET', BATCH, 'completed', 'failed', 'status', 'closing', 'paused')
  return {'accepted', tonumber(now[1]), tonumber(now[2]), now[3], now[4] and 1 or 0, now[5] and 1 or 0}
end

local joined, before
if seg ~= '' then
  local state = state_of(seg)
  if not is[1] or not owns(seg, attempt) then
    return {'fenced'}
  end
  joined, before = state, redis.call('HGET', state, 'joined')
else
  local early = (is[1] == 'validating' or is[1] == 'in_progress') and not is[2]
  local may = attempt == '' and early or (attempt ~= '' and is[2] == attempt)
  if not may or FINAL[is[1]] then
    return {'fenced'}
  end
  joined, before = BATCH, is[3]
end
if not ARGV[5] or before == ARGV[5] then  -- nothing is left of it, or the reply to it was lost
  return answer()
end

local set, refused = {}, {}
for at = 5, #ARGV, 8 do
  local packed = ARGV[at + 7]
  for place = 1, #packed, 4 do
    local line = struct.unpack('>I4', packed, place)
    if redis.call('SETBIT', ROWS, line, 1) == 0 then
      set[#set + 1] = line
    else
      refused[#refused + 1] = line
    end
  end
end
if refused[1] then
  for _, line in ipairs(set) do
    redis.call('SETBIT', ROWS, line, 0)
  end
  keep(ROWS)
  table.insert(refused, 1, 'refused')
  return refused
end

for at = 5, #ARGV, 8 do
  local kind, rows = ARGV[at + 2], ARGV[at + 3]
  redis.call('HINCRBY', BATCH, kind == 'output' and 'completed' or 'failed', rows)
  redis.call('HINCRBY', BATCH, 'prompt_tokens', ARGV[at + 4])
  redis.call('HINCRBY', BATCH, 'completion_tokens', ARGV[at + 5])
  redis.call('HINCRBY', BATCH, 'cached_tokens', ARGV[at + 6])
  redis.call('RPUSH', OBJECTS, ARGV[at + 1])
end
for _, line in ipairs(set) do
  redis.call('UNLINK', log_of(line))
end
redis.call('HSET', joined, 'joined', ARGV[5])
keep(ROWS, OBJECTS)
local counts = redis.call('HMGET', BATCH, 'total', 'completed', 'failed')
for at = 5, #ARGV, 8 do
  tell(string.format('{"kind":"rows","object":"%s","output":"%s","rows":%s,"counts":{"total":%s,"completed":%s,'
    .. '"failed":%s},"at":%s}', ARGV[at], ARGV[at + 2], ARGV[at + 3], counts[1], counts[2], counts[3], NOW))
end
tell_progress()
if is[1] == 'in_progress' and not is[4] then
  stop_if_too_many_failed()
end
finish_if_whole()
return answer()
