-- Not a script: stands in front of those that put messages into a queue or take them out.
--
-- An entry of a message list is "<base>#<n>\n<payload>": n claims so far. A claim's tag is "<base>#<n+1>", so that
-- every claim has a tag of its own, and the tag of a claim that was taken away is spent. A claim is remembered as
-- "<queue>\n<tenant>\n<payload>" under its tag.
--
-- Tenants take turns by start-time fair queueing: the one served least is next, each message counts 1, and who
-- joins starts level with the least served, or where it left off if that is further on.
local TENANTS, PAST = '{queue_tenants}', '{queue_past}'
local MESSAGES, FLAGS = '{queue_messages}', '{queue}'
local DEAD, DEAD_AT, DEAD_NEW = '{queue_dead}', '{queue_dead_at}', '{dead_new}'
local BELL, CLAIMS, EXPIRY, SWEEP = '{bell}', '{claims}', '{claim_expiry}', '{sweep}'

local HEADERS = 4096  -- they stand behind the body, which may be long

-- The id of the task in an entry or a claim; nil if it has none that could be a job's.
local function task_of(entry)
  return (string.match(string.sub(entry, -HEADERS), '"id": ?"([%w_.-]+)"'))
end

local function clock(override)
  if override ~= '' then
    return tonumber(override)
  end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function ring(queue)
  redis.call('XADD', BELL, 'MAXLEN', '1', '*', 'queue', queue)
end

local function join(queue, tenant, credit)
  local tenants, past = string.format(TENANTS, queue), string.format(PAST, queue)
  if redis.call('ZSCORE', tenants, tenant) then
    if credit ~= 0 then
      redis.call('ZINCRBY', tenants, -credit, tenant)
    end
    return
  end
  local start, least = 0, redis.call('ZRANGE', tenants, 0, 0, 'WITHSCORES')
  if least[1] then
    local left_off = redis.call('ZSCORE', past, tenant)
    start = math.max(tonumber(least[2]), tonumber(left_off or 0) - credit)
  end
  redis.call('ZADD', tenants, start, tenant)
  redis.call('ZREM', past, tenant)
end

-- Called after a message of the tenant was taken.
local function served(queue, tenant, left)
  local tenants, past = string.format(TENANTS, queue), string.format(PAST, queue)
  local total = redis.call('ZINCRBY', tenants, 1, tenant)
  if left > 0 then
    return
  end
  redis.call('ZREM', tenants, tenant)
  local least = redis.call('ZRANGE', tenants, 0, 0, 'WITHSCORES')
  if least[1] then
    redis.call('ZADD', past, total, tenant)
    redis.call('ZREMRANGEBYSCORE', past, '-inf', least[2])  -- these would start level anyway
  else
    redis.call('DEL', past)
  end
end

-- Takes a claim away and returns its queue, or nil if the tag is spent. It goes back to the head of its list.
local function give_back(tag)
  local claim = redis.call('HGET', CLAIMS, tag)
  redis.call('ZREM', EXPIRY, tag)
  if not claim then
    return nil
  end
  redis.call('HDEL', CLAIMS, tag)
  local queue, tenant, payload = string.match(claim, '^([^\n]*)\n([^\n]*)\n(.*)$')
  join(queue, tenant, 1)
  redis.call('RPUSH', string.format(MESSAGES, queue, tenant), tag .. '\n' .. payload)
  return queue
end

-- Writes a dead letter; once, however often it is said. The oldest go beyond `limit`, all of them `ttl` ms after the
-- last one came. `job` may be ''.
local function lay_out(queue, id, job, tenant, reason, payload, now, limit, ttl)
  local dead, order = string.format(DEAD, queue), string.format(DEAD_AT, queue)
  local record = string.format('{"v":1,"id":%s,%s"queue":%s,"tenant":%s,"reason":%s,"at":%.3f,"payload":%s}',
    cjson.encode(id), job ~= '' and '"job_id":' .. cjson.encode(job) .. ',' or '', cjson.encode(queue),
    cjson.encode(tenant), cjson.encode(reason), now / 1000, cjson.encode(payload))
  local fresh = redis.call('HSETNX', dead, id, record)
  if fresh == 1 then
    redis.call('ZADD', order, now, id)
    for _, old in ipairs(redis.call('ZRANGE', order, 0, -1 - limit)) do
      redis.call('ZREM', order, old)
      redis.call('HDEL', dead, old)
      redis.call('SREM', DEAD_NEW, queue .. '\n' .. old)
    end
    redis.call('SADD', DEAD_NEW, queue .. '\n' .. id)
    redis.call('PEXPIRE', DEAD_NEW, ttl)
    redis.call('PEXPIRE', dead, ttl)
    redis.call('PEXPIRE', order, ttl)
  end
  return fresh
end
