"""The `streams` section of the settings."""

from typing import ClassVar

from pydantic import Field

from esper.metrics.settings import MetricsEndpointSettings
from esper.schemas.topics import TELEMETRY_RETENTION


class StreamsSettings(MetricsEndpointSettings):
    """Settings of a stream worker."""

    metrics_port_variable: ClassVar[str] = "ESPER_STREAMS__METRICS_PORT"

    group: str = Field("esper-streams", description="Kafka consumer group; workers in one group share the partitions.")
    member_id: int | None = Field(
        None,
        ge=0,
        lt=256,
        description="Number of the worker's static group membership; default: the host's first free one.",
    )
    max_batch_records: int = Field(
        5_000, ge=1, description="Maximum records per transaction; more hold locks longer, fewer lower the throughput."
    )
    buffered_batches: int = Field(
        8, ge=1, description="Maximum number of batches per topic that wait in memory; more need more memory."
    )
    concurrent_batches: int = Field(
        4, ge=1, description="Batches projected at once, each on its own connection; at most `postgres.pool_size`."
    )
    session_timeout_s: float = Field(
        10.0, gt=0, description="Seconds without heartbeat until Kafka reassigns partitions; too few drop busy workers."
    )
    retry_max_delay_s: float = Field(
        5.0, gt=0, description="Longest pause between two attempts while Postgres or Kafka is unavailable, in seconds."
    )
    transaction_timeout_s: float = Field(
        120.0, gt=0, description="Seconds until Postgres aborts a batch; until then a lost host blocks its partition."
    )
    stalled_after_s: float = Field(
        30.0, gt=0, description="Seconds without progress until a partition with unread records counts as stalled."
    )
    window_retention_h: float = Field(
        TELEMETRY_RETENTION.total_seconds() / 3600,
        gt=0,
        description="Hours to keep health windows, in whole days; a rebuild cannot restore what Kafka has deleted.",
    )
