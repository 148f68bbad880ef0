"""The rights of each service on the broker, as data.

Pure; ``esper.oona.admin.acls`` applies them to a broker. Invariant: redrives excepted, one service writes a topic's
events, and only Tamiyo writes views, decisions, commands and policies. Idempotent producers need no extra right.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from esper.schemas.topics import (
    BLUEPRINTS,
    COMMANDS,
    DECISIONS,
    FIELD_REPORTS,
    LIFECYCLE,
    POLICIES,
    REDRIVES,
    RUNS,
    TELEMETRY,
    TOPICS,
    VIEWS,
    TopicSpec,
    all_topics,
)


class Service(StrEnum):
    """A service with its own user on the broker. ``operator`` is a person at the command line."""

    TRAINER = "trainer"
    WORKER = "worker"
    URZA = "urza"
    TAMIYO = "tamiyo"
    OPERATOR = "operator"


class Resource(StrEnum):
    """The kind of resource that a right is on."""

    TOPIC = "topic"
    GROUP = "group"
    CLUSTER = "cluster"


class Operation(StrEnum):
    """The operation that a right allows. READ and WRITE imply DESCRIBE."""

    READ = "read"
    WRITE = "write"
    CREATE = "create"
    DESCRIBE = "describe"


@dataclass(frozen=True, slots=True, order=True)
class Right:
    """One service may perform one operation on one resource."""

    service: Service
    resource: Resource
    name: str
    operation: Operation


CLUSTER = "kafka-cluster"
"""Kafka's name of the cluster resource."""

WRITER: Mapping[TopicSpec, Service] = {
    TELEMETRY: Service.TRAINER,
    RUNS: Service.TRAINER,
    LIFECYCLE: Service.TRAINER,
    FIELD_REPORTS: Service.TRAINER,
    VIEWS: Service.TAMIYO,
    DECISIONS: Service.TAMIYO,
    COMMANDS: Service.TAMIYO,
    POLICIES: Service.TAMIYO,
    BLUEPRINTS: Service.URZA,
    REDRIVES: Service.OPERATOR,
}
"""Topic -> the one service that writes its events. Tamiyo also writes redrives, for dead letters of its own topics."""

READERS: Mapping[TopicSpec, tuple[Service, ...]] = {
    COMMANDS: (Service.TRAINER,),
    LIFECYCLE: (Service.TRAINER,),  # a resumed run reads what it did before
    VIEWS: (Service.TAMIYO,),  # Tamiyo learns from these four
    DECISIONS: (Service.TAMIYO,),
    FIELD_REPORTS: (Service.TAMIYO,),
    POLICIES: (Service.TAMIYO,),
}
"""Topic -> its readers in addition to the worker and the operator, which read every topic."""


def default_principals() -> dict[Service, str]:
    """The default principal of each service."""
    return {service: f"User:esper-{service}" for service in Service}


def rights(group: str) -> tuple[Right, ...]:
    """Every right that Esper needs, without duplicates, in order.

    Args:
        group: the consumer group of the stream workers.
    """
    return tuple(sorted({*_topic_rights(), *_other_rights(group)}))


def _topic_rights() -> Iterator[Right]:
    for spec in TOPICS:
        readers = (*READERS.get(spec, ()), Service.WORKER, Service.OPERATOR)
        yield from (_topic_right(spec, reader, Operation.READ) for reader in readers)
        yield _topic_right(spec, WRITER[spec], Operation.WRITE)
        if WRITER[spec] is Service.TAMIYO:  # records that control a run may be redriven by Tamiyo alone
            yield _topic_right(spec.dead_letters, Service.TAMIYO, Operation.READ)
        else:
            yield _topic_right(spec, Service.OPERATOR, Operation.WRITE)
        yield _topic_right(spec.dead_letters, Service.WORKER, Operation.WRITE)
        yield _topic_right(spec.dead_letters, Service.OPERATOR, Operation.READ)
    yield from (_topic_right(REDRIVES, Service.TAMIYO, operation) for operation in (Operation.READ, Operation.WRITE))
    for spec in all_topics():
        yield _topic_right(spec, Service.OPERATOR, Operation.CREATE)
        # every service checks at its start that all topics exist
        yield from (_topic_right(spec, service, Operation.DESCRIBE) for service in Service)


def _other_rights(group: str) -> Iterator[Right]:
    yield Right(Service.WORKER, Resource.GROUP, group, Operation.READ)
    yield Right(Service.OPERATOR, Resource.CLUSTER, CLUSTER, Operation.DESCRIBE)  # `esper acls list`


def _topic_right(spec: TopicSpec, service: Service, operation: Operation) -> Right:
    return Right(service, Resource.TOPIC, spec.name, operation)
