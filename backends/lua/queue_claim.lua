-- Take the next message: queues in the order given, in each the tenant served least.
-- KEYS    (none)
-- ARGV    1 now (ms; '' = the server's clock)   2 lease (ms)   3… a pair per queue: name, '1' to keep no claim
-- returns {queue, tag, n, tenant, payload}: n is how often it was delivered, this time included
--         or {id}, the bell's last, if there is nothing: whoever waits for a later one misses nothing
local function take(queue, unacknowledged)
  if redis.call('HGET', string.format(FLAGS, queue), 'paused') then
    return nil
  end
  local tenants = string.format(TENANTS, queue)
  while true do
    local least = redis.call('ZRANGE', tenants, 0, 0)
    if not least[1] then
      return nil
    end
    local tenant = least[1]
    local list = string.format(MESSAGES, queue, tenant)
    local entry = redis.call('RPOP', list)
    if not entry then
      redis.call('ZREM', tenants, tenant)  -- its list has expired
    else
      served(queue, tenant, redis.call('LLEN', list))
      local base, n, payload = string.match(entry, '^([^#\n]*)#(%d+)\n(.*)$')
      if not base then  -- not put by our script: still delivered, so that somebody looks at it
        base, n, payload = redis.sha1hex(entry), 0, entry
      end
      n = n + 1
      local tag = base .. '#' .. n
      if not unacknowledged then
        while redis.call('HEXISTS', CLAIMS, tag) == 1 do  -- a put that was repeated: two of the same base
          n = n + 1
          tag = base .. '#' .. n
        end
        redis.call('HSET', CLAIMS, tag, queue .. '\n' .. tenant .. '\n' .. payload)
        redis.call('ZADD', EXPIRY, clock(ARGV[1]) + ARGV[2], tag)
      end
      return {queue, tag, n, tenant, payload}
    end
  end
end

for i = 3, #ARGV, 2 do
  local message = take(ARGV[i], ARGV[i + 1] == '1')
  if message then
    return message
  end
end
local last = redis.call('XREVRANGE', BELL, '+', '-', 'COUNT', 1)
return {last[1] and last[1][1] or '0-0'}
