"""The `streams` section of the settings."""

from pydantic import Field

from esper.config import SectionModel


class StreamsSettings(SectionModel):
    """How a worker runs.

    ``group`` is the consumer group that workers share. ``slot`` fixes the worker's static
    membership id on its host; by default the first free slot is taken. ``metrics_port`` 0
    takes a free port, which the log names.
    """

    group: str = "esper-streams"
    slot: int | None = Field(None, ge=0, lt=256)
    max_batch_records: int = Field(5_000, ge=1)
    buffered_batches: int = Field(8, ge=1)
    session_timeout_s: float = Field(10.0, gt=0)
    retry_max_delay_s: float = Field(5.0, gt=0)
    metrics_port: int = Field(0, ge=0, le=65535)
