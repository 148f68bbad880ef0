"""The topics of Oona: names, partition counts and retention. A partition count never changes."""

from dataclasses import dataclass
from datetime import timedelta

FOREVER_MS = -1
TELEMETRY_RETENTION = timedelta(hours=72)
DEAD_LETTER_SUFFIX = ".dlq"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """One topic. ``retention_ms`` is -1 where records are kept forever."""

    name: str
    num_partitions: int
    retention_ms: int = FOREVER_MS

    @property
    def partitions(self) -> list[tuple[str, int]]:
        """(topic, partition) of every partition."""
        return [(self.name, n) for n in range(self.num_partitions)]

    @property
    def dead_letters(self) -> "TopicSpec":
        """The topic for records of this topic that cannot be decoded: same partition count, kept forever.

        A dead letter must outlive its origin, since a replay skips records that have one.
        """
        return TopicSpec(self.name + DEAD_LETTER_SUFFIX, self.num_partitions)


TELEMETRY = TopicSpec("telemetry.seed.health", 12, int(TELEMETRY_RETENTION.total_seconds() * 1000))
RUNS = TopicSpec("system.runs", 12)
VIEWS = TopicSpec("control.tamiyo.views", 12)
DECISIONS = TopicSpec("control.tamiyo.decisions", 12)
COMMANDS = TopicSpec("control.kasmina.commands", 12)
LIFECYCLE = TopicSpec("control.kasmina.lifecycle", 12)
FIELD_REPORTS = TopicSpec("innovation.field-reports", 12)
BLUEPRINTS = TopicSpec("innovation.blueprints", 6)
POLICIES = TopicSpec("control.tamiyo.policies", 6)
REDRIVES = TopicSpec("system.redrives", 6)

TOPICS: tuple[TopicSpec, ...] = (
    TELEMETRY,
    RUNS,
    VIEWS,
    DECISIONS,
    COMMANDS,
    LIFECYCLE,
    FIELD_REPORTS,
    BLUEPRINTS,
    POLICIES,
    REDRIVES,
)


def all_topics() -> tuple[TopicSpec, ...]:
    """Every topic, each followed by its dead letter topic."""
    return tuple(t for spec in TOPICS for t in (spec, spec.dead_letters))
