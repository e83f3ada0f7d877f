-- Hand claims back to the heads of their lists, the first tag foremost, and ring the bell.
-- KEYS    (none)
-- ARGV    tags, in the order they were claimed
-- returns for each tag 1, or 0 if it was spent
local done, rung = {}, {}
for i = #ARGV, 1, -1 do
  local queue = give_back(ARGV[i])
  done[i] = queue and 1 or 0
  if queue and not rung[queue] then
    rung[queue] = true
    ring(queue)
  end
end
return done
