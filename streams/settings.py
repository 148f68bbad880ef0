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
        description="Number of the worker's static group membership on its host. If not set, the worker takes the "
        "first free number.",
    )
    max_batch_records: int = Field(
        5_000,
        ge=1,
        description="Maximum number of records in one transaction. Small batches lower the throughput; large ones "
        "delay the first rows and hold locks longer.",
    )
    buffered_batches: int = Field(
        8, ge=1, description="Maximum number of batches per topic that wait in memory; more need more memory."
    )
    concurrent_batches: int = Field(
        4,
        ge=1,
        description="Number of batches projected at the same time, each of a different partition and on its own "
        "Postgres connection. Keep it at or below `postgres.pool_size`.",
    )
    session_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds without a heartbeat after which Kafka gives the worker's partitions to another one. "
        "Too small: a busy worker loses its partitions. Too large: a dead worker holds them longer.",
    )
    retry_max_delay_s: float = Field(
        5.0, gt=0, description="Longest pause between two attempts while Postgres or Kafka is unavailable, in seconds."
    )
    transaction_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Seconds after which Postgres aborts a batch's transaction. This bounds how long a stopped worker "
        "or a lost host can block its partition; too small a value aborts large batches.",
    )
    stalled_after_s: float = Field(
        30.0,
        gt=0,
        description="Seconds without progress after which a partition that has unprocessed records is reported as "
        "stalled.",
    )
    window_retention_h: float = Field(
        TELEMETRY_RETENTION.total_seconds() / 3600,
        gt=0,
        description="Hours for which health windows are kept, rounded up to whole days. A rebuild cannot restore "
        "windows older than `kafka.telemetry_retention_h`, because Kafka no longer has their records.",
    )
