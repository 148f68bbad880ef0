"""Options of a trainer's connection: boundaries, sampling, limits."""

from pathlib import Path

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import HOST_DESCRIPTION, PORT_DESCRIPTION, MetricsAddress

OUTBOX_FILE, SPILL_FILE = "outbox.sqlite", "telemetry.sqlite"


class LinkOptions(SectionModel):
    """Options of ``esper.connect``."""

    boundary_steps: int = Field(
        50,
        ge=1,
        description="Number of optimizer steps between two boundaries, where commands are applied and stages advance. "
        "Too small: the outbox costs time in each step. Too large: growth is slow.",
    )
    health_every_steps: int = Field(
        10,
        ge=1,
        description="Number of optimizer steps between two health measurements. Small values slow training; large ones "
        "leave few samples per boundary.",
    )
    metric: str = Field(
        "val_accuracy", description="Metric of `epoch_completed` that field reports compare; higher is better."
    )
    folder: Path = Field(Path("runs"), description="Folder for the outbox, checkpoints and local state of each run.")
    max_queued_telemetry: int = Field(
        10_000,
        ge=1,
        description="Maximum number of telemetry records in memory; beyond it, new records are dropped and counted.",
    )
    max_spilled_telemetry: int = Field(
        100_000,
        ge=0,
        description="Maximum number of telemetry records on disk while Kafka is unavailable; beyond it, new records "
        "are dropped and counted.",
    )
    flush_timeout_s: float = Field(
        30.0,
        ge=0,
        description="Seconds for which the end of a run waits for Kafka. Unsent events stay in the outbox; the next "
        "incarnation or `esper outbox send` sends them.",
    )
    metrics_host: str = Field("127.0.0.1", description=HOST_DESCRIPTION)
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description=f"{PORT_DESCRIPTION} If not set, a training script opens no port; `esper train` takes a free one.",
    )
    outbox_max_pages: int | None = Field(
        None,
        ge=16,
        description="Maximum size of the outbox, in SQLite pages of 4 KiB. If not set, the disk is the limit.",
    )

    @property
    def metrics_address(self) -> MetricsAddress | None:
        """Where the trainer serves its metrics; None if it serves none."""
        if self.metrics_port is None:
            return None
        return MetricsAddress(self.metrics_host, self.metrics_port, "ESPER_TRAINER__LINK__METRICS_PORT")
