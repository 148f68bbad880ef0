"""Who may do what on the broker: the rights of each service, as data.

Pure; esper.oona.admin.acls brings them to a broker. Invariant: one service writes a topic's events, and
only Tamiyo writes what decides over a run (redrives aside). Idempotent producers need no right of their own.
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
    """Who has a user of its own on the broker. ``operator`` is a person at the command line."""

    TRAINER = "trainer"
    WORKER = "worker"
    URZA = "urza"
    TAMIYO = "tamiyo"
    OPERATOR = "operator"


class Resource(StrEnum):
    """What a right is on."""

    TOPIC = "topic"
    GROUP = "group"
    CLUSTER = "cluster"


class Operation(StrEnum):
    """What a right allows. READ and WRITE imply DESCRIBE."""

    READ = "read"
    WRITE = "write"
    CREATE = "create"
    DESCRIBE = "describe"


@dataclass(frozen=True, slots=True, order=True)
class Right:
    """One service may do one thing on one resource."""

    service: Service
    resource: Resource
    name: str
    operation: Operation


CLUSTER = "kafka-cluster"
"""What Kafka calls the only cluster there is."""

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
"""Topic -> the one service whose events it holds. Tamiyo tells of redrives too, of its own topics' letters."""

READERS: Mapping[TopicSpec, tuple[Service, ...]] = {
    COMMANDS: (Service.TRAINER,),
    LIFECYCLE: (Service.TRAINER,),  # a resumed run finds what it did before
    VIEWS: (Service.TAMIYO,),  # the next four are what Tamiyo learns from
    DECISIONS: (Service.TAMIYO,),
    FIELD_REPORTS: (Service.TAMIYO,),
    POLICIES: (Service.TAMIYO,),
}
"""Topic -> who reads it, beside the worker and the operator, who read them all."""


def default_principals() -> dict[Service, str]:
    """The user of each service, where nobody names another."""
    return {service: f"User:esper-{service}" for service in Service}


def rights(group: str) -> tuple[Right, ...]:
    """Every right that Esper needs, each once, in order.

    Args:
        group: the consumer group of the stream workers.
    """
    return tuple(sorted({*_of_topics(), *_beside_topics(group)}))


def _of_topics() -> Iterator[Right]:
    for spec in TOPICS:
        readers = (*READERS.get(spec, ()), Service.WORKER, Service.OPERATOR)
        yield from (_on(spec, reader, Operation.READ) for reader in readers)
        yield _on(spec, WRITER[spec], Operation.WRITE)
        if WRITER[spec] is Service.TAMIYO:  # what decides over a run is redriven as Tamiyo, or not at all
            yield _on(spec.dead_letters, Service.TAMIYO, Operation.READ)
        else:
            yield _on(spec, Service.OPERATOR, Operation.WRITE)
        yield _on(spec.dead_letters, Service.WORKER, Operation.WRITE)
        yield _on(spec.dead_letters, Service.OPERATOR, Operation.READ)
    yield from (_on(REDRIVES, Service.TAMIYO, operation) for operation in (Operation.READ, Operation.WRITE))
    for spec in all_topics():
        yield _on(spec, Service.OPERATOR, Operation.CREATE)
        # who starts makes sure that every topic is there
        yield from (_on(spec, service, Operation.DESCRIBE) for service in Service)


def _beside_topics(group: str) -> Iterator[Right]:
    yield Right(Service.WORKER, Resource.GROUP, group, Operation.READ)
    yield Right(Service.OPERATOR, Resource.CLUSTER, CLUSTER, Operation.DESCRIBE)  # `esper acls list`


def _on(spec: TopicSpec, service: Service, operation: Operation) -> Right:
    return Right(service, Resource.TOPIC, spec.name, operation)
