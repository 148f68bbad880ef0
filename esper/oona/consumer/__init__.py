"""GroupConsumer: a consumer-group member that commits an offset only after its handler has returned."""
