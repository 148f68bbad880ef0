"""The outbox: a trainer's events on its own disk until Kafka has acknowledged them."""
