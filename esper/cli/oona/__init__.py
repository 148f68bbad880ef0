"""Commands about Oona, the event bus: topics, events, dead letters, outboxes and rights."""
