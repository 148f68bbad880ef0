"""Checks before a start that this user may read its topics and join its consumer group.

A consumer that meets a missing right later retries without limit, or fails in the middle of its work.
"""

from collections.abc import Collection

from aiokafka import TopicPartition
from aiokafka.errors import GroupAuthorizationFailedError, GroupCoordinatorNotAvailableError, KafkaError

from esper.config import KafkaSettings
from esper.oona.admin.topics import admin_client
from esper.oona.broker_errors import kafka_error
from esper.oona.client_options import preflight_check
from esper.oona.log_reader import assigned_consumer

POLL_MS = 300  # a topic that may not be read is refused at once; the others return nothing


async def verify_group(kafka: KafkaSettings, group: str) -> None:
    """Check that this user may see the consumer group.

    Raises:
        NotAllowedError: this user may not.
        UnavailableError: no broker answers.
    """
    async with admin_client(kafka) as client:
        try:
            await client.find_coordinator(group)
        except GroupAuthorizationFailedError as error:
            raise kafka_error(GroupAuthorizationFailedError(group), kafka) from error
        except GroupCoordinatorNotAvailableError:
            return  # the first group on a broker: its members wait for the coordinator
        except KafkaError as error:
            raise kafka_error(error, kafka) from error


async def verify_readable(kafka: KafkaSettings, topics: Collection[str]) -> None:
    """Check that this user may see and read these topics.

    Raises:
        NotAllowedError: this user may not read a topic; the message names it.
        UnavailableError: no broker answers.
    """
    await preflight_check(kafka, topics)
    partitions = [TopicPartition(topic, 0) for topic in topics]
    async with assigned_consumer(kafka, partitions) as consumer:
        try:
            await consumer.seek_to_end(*partitions)
            await consumer.getmany(timeout_ms=POLL_MS)
        except KafkaError as error:
            raise kafka_error(error, kafka) from error
