-- Queue an event for delivery, unless it is known.
-- ARGV    1 id   2 type   3 URL   4 its data, as JSON
-- returns 1 queued; 0 known
return put_event(ARGV[1], ARGV[2], ARGV[3], ARGV[4])
