"""The contracts: everything that crosses a process boundary in Esper.

Owns the enums, the assets, the events, the envelope, and the registry that maps each event type to its topic and
record key. Does no I/O. Invariant: it imports pydantic and the standard library alone, so that any program can read
the log.
"""
