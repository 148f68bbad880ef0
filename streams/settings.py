"""The `streams` section of the settings."""

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import MetricsAddress
from esper.schemas.topics import TELEMETRY_RETENTION


class StreamsSettings(SectionModel):
    """How a stream worker runs."""

    group: str = Field("esper-streams", description="The consumer group that workers share.")
    member_id: int | None = Field(
        None,
        ge=0,
        lt=256,
        description="Fixes the worker's static membership id on its host; the first free slot where it is not set.",
    )
    max_batch_records: int = Field(5_000, ge=1, description="Records folded in one transaction, at most.")
    buffered_batches: int = Field(8, ge=1, description="Batches of a topic that wait in memory to be folded, at most.")
    concurrent_batches: int = Field(
        4, ge=1, description="Batches folded at once, each of another partition and on a connection of its own."
    )
    session_timeout_s: float = Field(
        10.0, gt=0, description="How long a silent worker keeps its partitions, in seconds."
    )
    retry_max_delay_s: float = Field(
        5.0, gt=0, description="Longest pause between two tries while Postgres or Kafka is away, in seconds."
    )
    transaction_timeout_s: float = Field(
        120.0,
        gt=0,
        description="When Postgres ends a batch's transaction, in seconds: so long can a worker that was stopped, "
        "or whose host is gone, hold up its partition.",
    )
    stalled_after_s: float = Field(
        30.0, gt=0, description="How long a partition with records left may stand still before it is told, in seconds."
    )
    window_retention_h: float = Field(
        TELEMETRY_RETENTION.total_seconds() / 3600,
        gt=0,
        description="How long health windows are kept, in hours, by whole days of the log. The log has their telemetry "
        "no longer than that, so that a rebuild would not bring older ones back.",
    )
    metrics_host: str = Field("127.0.0.1", description="The address that metrics and readiness are served on.")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Where Prometheus reads; 0 takes a free port, which the log names."
    )

    @property
    def metrics_address(self) -> MetricsAddress:
        """Where the worker answers Prometheus."""
        return MetricsAddress(self.metrics_host, self.metrics_port, "ESPER_STREAMS__METRICS_PORT")
