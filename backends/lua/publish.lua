-- Write entries of many running jobs, and tell their followers: one call per engine step.
-- KEYS    state hash (a row's: its segment's) and log of each job: 1 2, 3 4, ...
-- ARGV    for each job: attempt, count, then seq and event of each entry, seq rising
-- returns the jobs (1, 2, ...) that refused
--
-- An entry is written only by the attempt that the state names, and only right after the log's last entry. One
-- that stands there already is skipped: a call whose reply was lost may be repeated. Everything else is refused: a
-- newer attempt, a job that is final or was handed back, and a state or log that the server lost, where writing on
-- would leave a hole (or a key without expiry).
local function top_seq(log, attempt)
  local top = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  local owner, seq = string.match(top and top[1] or '', '^(%d+)%-(%d+)$')
  return owner == attempt and tonumber(seq) or nil
end

local refused = {}
local at = 1
for job = 1, #KEYS / 2 do
  local state, log = KEYS[2 * job - 1], KEYS[2 * job]
  local attempt, count = ARGV[at], tonumber(ARGV[at + 1])
  local is = redis.call('HMGET', state, 'state', 'attempt')
  local top = is[1] == 'running' and is[2] == attempt and top_seq(log, attempt)
  for entry = at + 2, at + 2 * count, 2 do
    local seq = tonumber(ARGV[entry])
    if not top or seq > top + 1 then
      refused[#refused + 1] = job
      break
    elseif seq == top + 1 then
      local id = attempt .. '-' .. ARGV[entry]
      redis.call('XADD', log, id, 'd', ARGV[entry + 1])
      redis.call('PUBLISH', log, id .. ' ' .. ARGV[entry + 1])
      top = seq
    end
  end
  at = at + 2 + 2 * count
end
return refused
