-- Write a dead letter of a broker that is not this server.
-- KEYS    (none)
-- ARGV    1 now (ms; '' = the server's clock)   2 queue   3 id   4 job id or ''   5 tenant   6 reason   7 payload
--         8 how many dead letters a queue keeps   9 ms they are kept
-- returns 1, or 0 if it stands there already
return lay_out(ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], clock(ARGV[1]), tonumber(ARGV[8]), ARGV[9])
