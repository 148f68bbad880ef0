"""Administration of the broker: topics, ACLs, SCRAM users, and the checks before a start."""
