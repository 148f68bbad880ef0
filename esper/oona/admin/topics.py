"""Topics: ``esper topics apply`` creates them, every service checks them at its start.

Invariant: no client creates a topic implicitly, and an existing topic is never changed.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from esper.config import KafkaSettings
from esper.errors import ConfigError
from esper.oona.broker_errors import CLIENT_ERRORS, hidden_topics_error, kafka_error
from esper.oona.client_options import client_options, hidden_topics, started
from esper.oona.records import RECORD_LIMIT_BYTES
from esper.schemas.topics import DEAD_LETTER_SUFFIX, TELEMETRY, TopicSpec, all_topics

MS_PER_HOUR = 3_600_000
STARTUP_TIMEOUT_S, POLL_S = 10.0, 0.1
BATCH_LIMIT_BYTES = RECORD_LIMIT_BYTES + 65_536  # a batch with one record of the largest size
DEAD_LETTER_LIMIT_BYTES = BATCH_LIMIT_BYTES + 65_536  # the same, with the headers that a dead letter adds


class TopicState(StrEnum):
    """How a topic on the broker compares with its specification."""

    PRESENT = "present"
    CREATED = "created"
    MISSING = "missing"
    HIDDEN = "hidden: no right to see it"
    WRONG_COUNT = "wrong partition count"


@dataclass(frozen=True, slots=True)
class TopicStatus:
    """One topic and its state. ``num_partitions`` is the broker's count; None where the topic is missing or hidden."""

    spec: TopicSpec
    state: TopicState
    num_partitions: int | None


@asynccontextmanager
async def admin_client(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    """A connected admin client.

    Raises:
        NotAllowedError: the broker refuses this user.
        UnavailableError: no broker answers.
    """
    client = AIOKafkaAdminClient(**client_options(kafka), request_timeout_ms=10_000)
    async with started(client, kafka):
        await _wait_for_brokers(client, kafka)
        yield client


async def _wait_for_brokers(client: AIOKafkaAdminClient, kafka: KafkaSettings) -> None:
    """Wait until the cluster lists a broker: one that has just started lists none, and aiokafka then fails."""
    try:
        async with asyncio.timeout(STARTUP_TIMEOUT_S):
            while not (await client.describe_cluster())["brokers"]:
                await asyncio.sleep(POLL_S)
    except CLIENT_ERRORS as error:
        raise kafka_error(error, kafka) from error


async def list_topics(kafka: KafkaSettings) -> list[TopicStatus]:
    """Every topic of Esper, with its state.

    Raises:
        NotAllowedError: the broker refuses this user.
        UnavailableError: no broker answers.
    """
    async with admin_client(kafka) as client:
        return await _statuses(client, kafka)


async def apply_topics(kafka: KafkaSettings) -> list[TopicStatus]:
    """Create the missing topics; existing ones are never changed.

    Raises:
        NotAllowedError: this user may not see or create topics.
        UnavailableError: no broker answers, or it fails to create a topic.
        ConfigError: an existing topic has another partition count.
    """
    async with admin_client(kafka) as client:
        before = await _statuses(client, kafka)
        _refuse_hidden(before, kafka)
        missing = [s.spec for s in before if s.state is TopicState.MISSING]
        if missing:
            response = await client.create_topics([_new_topic(spec, kafka) for spec in missing])
            for topic, code, *_rest in response.topic_errors:
                if code and for_code(code) is not TopicAlreadyExistsError:
                    raise kafka_error(for_code(code)(topic), kafka)
    _refuse_wrong_counts(before)
    return [TopicStatus(s.spec, TopicState.CREATED, s.spec.num_partitions) if s.spec in missing else s for s in before]


async def verify_topics(kafka: KafkaSettings) -> None:
    """Check that every topic exists with its partition count.

    Raises:
        NotAllowedError: this user may not see a topic; the message names each.
        UnavailableError: no broker answers.
        ConfigError: a topic is missing, or has another partition count; the message names each.
    """
    statuses = await list_topics(kafka)
    _refuse_hidden(statuses, kafka)
    missing = [s.spec.name for s in statuses if s.state is TopicState.MISSING]
    if missing:
        raise ConfigError(f"topics are missing: {', '.join(missing)}; run `esper topics apply`")
    _refuse_wrong_counts(statuses)


async def cluster_id(kafka: KafkaSettings) -> str:
    """The id that the cluster was formatted with. A wiped broker has a new one.

    Raises:
        NotAllowedError, UnavailableError: as ``admin_client``.
    """
    async with admin_client(kafka) as client:
        return str((await client.describe_cluster())["cluster_id"])


def _new_topic(spec: TopicSpec, kafka: KafkaSettings) -> NewTopic:
    retention_ms = spec.retention_ms
    if spec == TELEMETRY:
        retention_ms = int(kafka.telemetry_retention_h * MS_PER_HOUR)
    limit_bytes = DEAD_LETTER_LIMIT_BYTES if spec.name.endswith(DEAD_LETTER_SUFFIX) else BATCH_LIMIT_BYTES
    config = {
        "cleanup.policy": "delete",
        "retention.ms": str(retention_ms),
        "max.message.bytes": str(limit_bytes),
        # the broker's clock: with a trainer's wrong clock, records would be refused or expire too early
        "message.timestamp.type": "LogAppendTime",
    }
    if kafka.min_insync_replicas > 1:
        config["min.insync.replicas"] = str(kafka.min_insync_replicas)
    return NewTopic(spec.name, spec.num_partitions, kafka.replication_factor, topic_configs=config)


async def _statuses(client: AIOKafkaAdminClient, kafka: KafkaSettings) -> list[TopicStatus]:
    try:
        found = await client.describe_topics()
    except KafkaError as error:
        raise kafka_error(error, kafka) from error
    counts = {t["topic"]: len(t["partitions"]) for t in found if not t["error_code"]}
    missing = [spec.name for spec in all_topics() if spec.name not in counts]
    hidden = await hidden_topics(kafka, missing) if missing else []
    return [_status(spec, counts.get(spec.name), spec.name in hidden) for spec in all_topics()]


def _status(spec: TopicSpec, count: int | None, is_hidden: bool) -> TopicStatus:
    if count is None:
        return TopicStatus(spec, TopicState.HIDDEN if is_hidden else TopicState.MISSING, None)
    state = TopicState.PRESENT if count == spec.num_partitions else TopicState.WRONG_COUNT
    return TopicStatus(spec, state, count)


def _refuse_hidden(statuses: list[TopicStatus], kafka: KafkaSettings) -> None:
    hidden = [s.spec.name for s in statuses if s.state is TopicState.HIDDEN]
    if hidden:
        raise hidden_topics_error(hidden, kafka)


def _refuse_wrong_counts(statuses: list[TopicStatus]) -> None:
    wrong = [s for s in statuses if s.state is TopicState.WRONG_COUNT]
    if wrong:
        counts = ", ".join(f"{s.spec.name} has {s.num_partitions}, not {s.spec.num_partitions}" for s in wrong)
        raise ConfigError(
            f"partition counts never change, but {counts}: this broker was not set up by Esper; "
            "check ESPER_KAFKA__BOOTSTRAP_SERVERS"
        )
