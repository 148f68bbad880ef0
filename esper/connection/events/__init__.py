"""Events that a trainer writes: their sequence numbers, health reports, field reports, the telemetry queue."""
