"""The messages of a run as they lie in the log."""

from esper.embedded.stack import EmbeddedStack
from esper.oona.log_reader import partition_of, read_range
from esper.schemas.messages import OonaMessage
from esper.schemas.topics import FIELD_REPORTS, LIFECYCLE, RUNS, TELEMETRY, TopicSpec

TRAINER_TOPICS = (RUNS, LIFECYCLE, FIELD_REPORTS, TELEMETRY)


async def read_run_messages(stack: EmbeddedStack, run_id: str, *topics: TopicSpec) -> list[OonaMessage]:
    """Messages of a run, one topic after the other, each in log order; all that a trainer writes by default."""
    found = []
    for topic in topics or TRAINER_TOPICS:
        async for record in read_range(stack.settings().need_kafka(), topic, partition=partition_of(run_id, topic)):
            if record.key == run_id.encode():
                found.append(record.decode())
    return found
