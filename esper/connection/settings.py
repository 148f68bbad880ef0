"""Options of a trainer's connection: boundaries, sampling, limits."""

from pathlib import Path

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import HOST_DESCRIPTION, PORT_DESCRIPTION, MetricsAddress

OUTBOX_FILE, SPILL_FILE = "outbox.sqlite", "telemetry.sqlite"


class LinkOptions(SectionModel):
    """Options of ``esper.connect``."""

    boundary_steps: int = Field(
        50, ge=1, description="Optimizer steps between boundaries, where commands apply; each boundary costs disk I/O."
    )
    health_interval_steps: int = Field(
        10, ge=1, description="Optimizer steps between two health measurements; small values slow training."
    )
    metric: str = Field(
        "val_accuracy", description="Metric of `epoch_completed` that field reports compare; higher is better."
    )
    folder: Path = Field(Path("runs"), description="Folder for the outbox, checkpoints and local state of each run.")
    max_queued_telemetry: int = Field(
        10_000, ge=1, description="Maximum telemetry records in memory; further ones are dropped and counted."
    )
    max_spilled_telemetry: int = Field(
        100_000,
        ge=0,
        description="Maximum telemetry records on disk while Kafka is unavailable; further ones are dropped.",
    )
    flush_timeout_s: float = Field(
        30.0, ge=0, description="Seconds that the end of a run waits for Kafka; unsent events stay in the outbox."
    )
    metrics_host: str = Field("127.0.0.1", description=HOST_DESCRIPTION)
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description=f"{PORT_DESCRIPTION} If not set, a training script opens no port; `esper train` takes a free one.",
    )
    outbox_max_pages: int | None = Field(
        None, ge=16, description="Maximum size of the outbox in SQLite pages of 4 KiB; default: the disk's size."
    )

    @property
    def metrics_address(self) -> MetricsAddress | None:
        """Where the trainer serves its metrics; None if it serves none."""
        if self.metrics_port is None:
            return None
        return MetricsAddress(self.metrics_host, self.metrics_port, "ESPER_TRAINER__LINK__METRICS_PORT")
