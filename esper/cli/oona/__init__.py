"""Commands about the bus: topics, ACLs, events, dead letters, outboxes."""
