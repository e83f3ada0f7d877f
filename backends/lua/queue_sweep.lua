-- Hand expired claims back, unless their owners may have had no chance to renew.
--
-- Every worker calls this every second; at most one call per period does anything, and it writes down when. A gap
-- of more than a third of a lease since then means that leases may have run out although their owners live:
--   nothing is written down       the gap may be any: one lease from now
--   the server was restarted      they get one lease, counted from its start
--   the caller swept before       it would have swept in the gap: the server, or everybody, stood still. One lease
--                                 from the gap's end, even if a newcomer was the first to sweep then
--   the caller is a newcomer      nobody may be left: a third of a lease. Any survivor sweeps within it, and says so
-- Leases are renewed every third, so that a shorter gap cannot have cost a living owner its lease. A worker that is
-- killed and started again therefore waits for the rest of its old leases, or a third of one after its start,
-- whichever is later.
--
-- KEYS    (none)
-- ARGV    1 now (ms; '' = the server's clock)   2 lease (ms)   3 period (ms)   4 the caller's last sweep, as returned
--         ('' = it is a newcomer)   5 how many to hand back at most   6, 7 run id, ms of the start (tests; else INFO)
-- returns {handed back, ms to hold off, now}; nothing done: {0, 0, now}
local now, lease = clock(ARGV[1]), tonumber(ARGV[2])
local newcomer, mine = ARGV[4] == '', tonumber(ARGV[4])

local function server()
  if ARGV[6] then
    return ARGV[6], tonumber(ARGV[7])
  end
  local info = redis.pcall('INFO', 'server')
  if type(info) ~= 'string' then  -- forbidden to this user: any gap may hide a restart
    return '', 0
  end
  return string.match(info, 'run_id:(%w+)'), now - 1000 * string.match(info, 'uptime_in_seconds:(%d+)')
end

local was = redis.call('HMGET', SWEEP, 'at', 'hold', 'run', 'gap')
local last, hold, gap_end = tonumber(was[1] or now), tonumber(was[2] or 0), tonumber(was[4])
local survivor = hold > now and gap_end and mine and mine < gap_end - lease / 3
if survivor then
  hold = math.max(hold, gap_end + lease)
elseif was[1] and now >= last and now - last < tonumber(ARGV[3]) then
  return {0, 0, now}
end
local run, started = server()
if not was[1] then
  hold = now + lease
elseif run ~= was[3] then
  -- After a failover the new server has long been up: what counts is that it is new to us.
  hold = math.max(hold, (started > last and started or now) + lease)
elseif now - last > lease / 3 or now < last then
  gap_end = now
  hold = math.max(hold, now + ((newcomer and run ~= '') and lease / 3 or lease))
end
redis.call('HDEL', SWEEP, 'at')  -- a first write that cannot grow: see queue_renew.lua
redis.call('HSET', SWEEP, 'at', now, 'hold', hold, 'run', run, 'gap', gap_end or '')
if hold > now then
  return {0, math.ceil(hold - now), now}
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
return {#expired, 0, now}
