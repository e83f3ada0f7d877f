-- Not a script: stands in front of those that tell the time. Their last argument is the unix time in ms, or '' for
-- the server's own clock, which is the only one that counts outside tests.
local NOW = table.remove(ARGV)

local function clock()  -- as TIME answers
  if NOW == '' then
    return redis.call('TIME')
  end
  return {math.floor(NOW / 1000), NOW % 1000 * 1000}
end

