"""Oona, the event bus: CloudEvents on Kafka, keyed and ordered as esper.schemas.registry says."""
