-- Put a claimed message that will not be delivered again aside, for a person to look at.
-- KEYS    (none)
-- ARGV    1 now (ms; '' = the server's clock)   2 tag   3 reason   4 how many dead letters a queue keeps
--         5 ms they are kept
-- returns 1, or 0 if the tag was spent
local claim = redis.call('HGET', CLAIMS, ARGV[2])
redis.call('ZREM', EXPIRY, ARGV[2])
if not claim then
  return 0
end
local queue, tenant, payload = string.match(claim, '^([^\n]*)\n([^\n]*)\n(.*)$')
local read, message = pcall(cjson.decode, payload)
local headers = read and type(message) == 'table' and message['headers']
local job = type(headers) == 'table' and headers['id']
lay_out(queue, ARGV[2], type(job) == 'string' and job or '', tenant, ARGV[3], payload,
  clock(ARGV[1]), tonumber(ARGV[4]), ARGV[5])
redis.call('HDEL', CLAIMS, ARGV[2])
return 1
