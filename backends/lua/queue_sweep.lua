-- Hand expired claims back, unless their owners may have had no chance to renew.
--
-- Every worker calls this every second; at most one call per period does anything, and it writes down when. A gap
-- of more than a third of a lease since then means that leases may have run out although their owners live:
--   nothing is written down       the gap may be any: one lease from now
--   the server was restarted      they get one lease, counted from its start
--   the server stood still        one lease from now
--   the caller was cut off too    one lease from now
--   otherwise nobody was there: whoever lived would have swept. Still a third of a lease, enough for one renewal,
--   should all of them have been cut off and the caller be new. A worker that is killed and started again therefore
--   waits for the rest of its old leases, or a third of one after its start, whichever is later.
-- Leases are renewed every third, so that a shorter gap cannot have cost a living owner its lease.
--
-- A server that stood still is one whose event loop hardly turned on its own account: an idle loop turns hz times a
-- second, and turns caused by clients are taken off, by the number of reads (of commands there are a dozen in each of
-- our scripts). A busy server may thus be taken for a frozen one, which costs time and nothing else; so may any server
-- if this user may not call INFO.
--
-- KEYS    (none)
-- ARGV    1 now (ms; '' = the server's clock)   2 lease (ms)   3 period (ms)   4 '1': the caller saw an outage
--         5 how many to hand back at most   6… run id, ms of the start, idle turns, turns per s (tests; else INFO)
-- returns {handed back, ms to hold off}; nothing done: {0, 0}
local now, lease = clock(ARGV[1]), tonumber(ARGV[2])

local function server()
  if ARGV[6] then
    return ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
  end
  local info = redis.pcall('INFO', 'server')
  local stats = redis.pcall('INFO', 'stats')
  if type(info) ~= 'string' or type(stats) ~= 'string' then  -- forbidden to this user
    return '', 0, nil, nil
  end
  local turns = tonumber(string.match(stats, 'eventloop_cycles:(%d+)'))
  return string.match(info, 'run_id:(%w+)'), now - 1000 * string.match(info, 'uptime_in_seconds:(%d+)'),
    turns and turns - string.match(stats, 'total_reads_processed:(%d+)'),
    tonumber(string.match(info, '[^_]hz:(%d+)'))
end

local was = redis.call('HMGET', SWEEP, 'at', 'hold', 'run', 'idle')
local last = tonumber(was[1] or now)
if was[1] and now >= last and now - last < tonumber(ARGV[3]) then
  return {0, 0}
end
local run, started, idle, hz = server()
local hold, gap = tonumber(was[2] or 0), now - last
if not was[1] then
  hold = now + lease
elseif run ~= was[3] then
  -- After a failover the new server has long been up: what counts is that it is new to us.
  hold = math.max(hold, (started > last and started or now) + lease)
elseif gap > lease / 3 or gap < 0 then
  local turned = idle and hz and tonumber(was[4]) and idle - was[4] >= gap / 1000 * hz / 2
  hold = math.max(hold, now + ((turned and ARGV[4] ~= '1') and lease / 3 or lease))
end
redis.call('HDEL', SWEEP, 'at')  -- a first write that cannot grow: see queue_renew.lua
redis.call('HSET', SWEEP, 'at', now, 'hold', hold, 'run', run, 'idle', idle or '')
if hold > now then
  return {0, math.ceil(hold - now)}
end

local expired = redis.call('ZRANGEBYSCORE', EXPIRY, '-inf', now, 'LIMIT', 0, ARGV[5])
local rung = {}
for i = #expired, 1, -1 do
  local queue = give_back(expired[i])
  if queue and not rung[queue] then
    rung[queue] = true
    ring(queue)
  end
end
return {#expired, 0}
