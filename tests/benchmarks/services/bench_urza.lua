-- Script for wrk: requests the given paths in turn and prints the measurements as one line of JSON.
-- The first argument is the mean pause of a connection between two requests in ms; 0 for no pause.
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
