"""Events that a trainer writes: sequence numbers, health reports, field reports and the telemetry queue."""
