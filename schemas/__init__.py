"""The contracts: everything that crosses a process boundary in Esper.

Owns the words (enums), the assets, the events, the envelope and the registry
that says which event type lives on which topic under which key. It imports
pydantic and the standard library alone, so that any program can read the log.
"""
