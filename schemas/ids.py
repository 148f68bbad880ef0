"""Deterministic ids of records: a resend has the id of the first send, so that readers can drop duplicates."""

from uuid import UUID, uuid5

NAMESPACE = UUID("6b1fe0c8-3f0a-5a3b-9a8e-2f1f4d1c7e55")
"""The UUID namespace of all ids. It must never change: resends would get other ids."""


def _id(*parts: object) -> UUID:
    return uuid5(NAMESPACE, "\x1f".join(str(p) for p in parts))


def trainer_event_id(run_id: str, incarnation: int, sequence: int) -> UUID:
    """The id of a trainer's event."""
    return _id("trainer-event", run_id, incarnation, sequence)


def view_id(run_id: str, incarnation: int, boundary: int) -> UUID:
    """The id of the view recorded for a boundary."""
    return _id("view", run_id, incarnation, boundary)


def decision_id(run_id: str, incarnation: int, boundary: int) -> UUID:
    """The id of the decision for a boundary: the same for every controller."""
    return _id("decision", run_id, incarnation, boundary)


def command_id(decision: UUID) -> UUID:
    """The id of the command that carries out a decision."""
    return _id("command", decision)


def request_id(idempotency_key: str) -> UUID:
    """The id of a change requested under an idempotency key."""
    return _id("request", idempotency_key)


def kernel_event_id(kernel_sha256: str) -> UUID:
    """The id of the registration of a kernel."""
    return _id("kernel", kernel_sha256)


def library_request_id(blueprint_id: str, version: int, change: str) -> UUID:
    """The id of a change that Urza itself requests of a blueprint version: the same from every Urza process."""
    return _id("library-request", blueprint_id, version, change)


def certificate_id(blueprint_id: str, version: int) -> UUID:
    """The id of the certificate of one version of a blueprint."""
    return _id("certificate", blueprint_id, version)


def kernel_refusal_id(blueprint_id: str, version: int, target: str, num_features: int) -> UUID:
    """The id of the refusal of one kernel."""
    return _id("kernel-refusal", blueprint_id, version, target, num_features)


def redriven_id(redrive_id: UUID, topic: str, partition: int, letter_offset: int) -> UUID:
    """The id of the event that reports one dead letter of one redrive as sent again."""
    return _id("redriven", redrive_id, topic, partition, letter_offset)
