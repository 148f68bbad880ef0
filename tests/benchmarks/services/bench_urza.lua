-- For wrk: asks for the paths that are given, one after the other, and prints what it saw as one line of JSON.
-- The first argument is how long a connection pauses before it asks again, in ms, on average; 0 for not at all.
local paths, at = {}, 0

function init(args)
  local pause = tonumber(args[1])
  for n = 2, #args do paths[n - 1] = args[n] end
  at = math.random(0, #paths - 1)
  if pause > 0 then
    delay = function() return math.random(0, 2 * pause) end
  end
end

function request()
  at = at % #paths + 1
  return wrk.format("GET", paths[at])
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "duration_us": %d, "p50_us": %d, "p95_us": %d, "p99_us": %d, "refused": %d, "broken": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(95), latency:percentile(99),
    e.status, e.connect + e.read + e.write + e.timeout))
end
