"""Whether this user may read what it is about to: asked before a start, when the answer is one clear line.

A group consumer that finds out later retries for ever, or ends in the middle of its work.
"""

from collections.abc import Collection

from aiokafka import TopicPartition
from aiokafka.errors import GroupAuthorizationFailedError, GroupCoordinatorNotAvailableError, KafkaError

from esper.config import KafkaSettings
from esper.oona.admin.topics import admin_client
from esper.oona.broker_errors import kafka_error
from esper.oona.client_options import preflight_check
from esper.oona.log_reader import assigned_consumer

ANSWER_MS = 300  # a topic that may not be read is refused at once; the others have nothing to give


async def verify_group(kafka: KafkaSettings, group: str) -> None:
    """Make sure that this user knows the consumer group: that the broker shows it to it.

    Raises:
        NotAllowedError: it does not.
        UnavailableError: no broker answers.
    """
    async with admin_client(kafka) as client:
        try:
            await client.find_coordinator(group)
        except GroupAuthorizationFailedError as error:
            raise kafka_error(GroupAuthorizationFailedError(group), kafka) from error
        except GroupCoordinatorNotAvailableError:
            return  # the first group of a broker: who joins it waits for its coordinator
        except KafkaError as error:
            raise kafka_error(error, kafka) from error


async def verify_readable(kafka: KafkaSettings, topics: Collection[str]) -> None:
    """Make sure that this user may see and read these topics.

    Raises:
        NotAllowedError: names one that it may not.
        UnavailableError: no broker answers.
    """
    await preflight_check(kafka, topics)
    places = [TopicPartition(topic, 0) for topic in topics]
    async with assigned_consumer(kafka, [(p.topic, p.partition) for p in places]) as consumer:
        try:
            await consumer.seek_to_end(*places)
            await consumer.getmany(timeout_ms=ANSWER_MS)
        except KafkaError as error:
            raise kafka_error(error, kafka) from error
