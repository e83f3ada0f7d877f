-- Some fields of a job's state, and the end of its log.
-- KEYS    1 state hash   2 log
-- ARGV    1 how many log entries   2... fields
-- returns {values, log entries (last first)}
return {
  redis.call('HMGET', KEYS[1], unpack(ARGV, 2)),
  redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', ARGV[1]),
}
