"""Ids that say the same thing twice in the same way: a resend has the id of the first send."""

from uuid import UUID, uuid5

NAMESPACE = UUID("6b1fe0c8-3f0a-5a3b-9a8e-2f1f4d1c7e55")
"""The name space of all ids of Esper. It can never change."""


def _id(*parts: object) -> UUID:
    return uuid5(NAMESPACE, "\x1f".join(str(p) for p in parts))


def trainer_event_id(run_id: str, incarnation: int, sequence: int) -> UUID:
    """The id of a trainer's event."""
    return _id("trainer-event", run_id, incarnation, sequence)


def view_id(run_id: str, incarnation: int, boundary: int) -> UUID:
    """The id of the view recorded for a boundary."""
    return _id("view", run_id, incarnation, boundary)


def decision_id(run_id: str, incarnation: int, boundary: int) -> UUID:
    """The id of the decision for a boundary: one boundary, one decision."""
    return _id("decision", run_id, incarnation, boundary)


def command_id(decision: UUID) -> UUID:
    """The id of the command that carries a decision out."""
    return _id("command", decision)


def request_id(idempotency_key: str) -> UUID:
    """The id of a change requested under an idempotency key."""
    return _id("request", idempotency_key)


def kernel_event_id(kernel_sha256: str) -> UUID:
    """The id of the registration of a kernel."""
    return _id("kernel", kernel_sha256)


def library_request_id(blueprint_id: str, version: int, change: str) -> UUID:
    """The id of a change that Urza itself asks of one version of a blueprint: several Urzas ask once."""
    return _id("library-request", blueprint_id, version, change)


def certificate_id(blueprint_id: str, version: int) -> UUID:
    """The id of the certificate of one version of a blueprint."""
    return _id("certificate", blueprint_id, version)


def kernel_refusal_id(blueprint_id: str, version: int, target: str, num_features: int) -> UUID:
    """The id of the event that one kernel cannot be built."""
    return _id("kernel-refusal", blueprint_id, version, target, num_features)


def redriven_id(redrive_id: UUID, topic: str, partition: int, letter_offset: int) -> UUID:
    """The id of the event that a redrive sent a dead letter again: one redrive and letter, one event."""
    return _id("redriven", redrive_id, topic, partition, letter_offset)
