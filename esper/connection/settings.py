"""How a trainer is linked: boundaries, sampling, limits."""

from pathlib import Path

from pydantic import Field

from esper.config import SectionModel
from esper.metrics.settings import MetricsAddress

OUTBOX_FILE, SPILL_FILE = "outbox.sqlite", "telemetry.sqlite"


class LinkOptions(SectionModel):
    """Options of ``esper.connect``."""

    boundary_steps: int = Field(
        50, ge=1, description="Commands are applied and stages advance every so many optimizer steps."
    )
    health_every_steps: int = Field(10, ge=1, description="Health is taken every so many optimizer steps.")
    metric: str = Field("val_accuracy", description="The metric of `epoch_completed` that field reports tell.")
    folder: Path = Field(Path("runs"), description="Where outboxes and local state of runs are kept.")
    max_queued_telemetry: int = Field(
        10_000, ge=1, description="Telemetry records in memory before the newest are dropped and counted."
    )
    max_spilled_telemetry: int = Field(
        100_000, ge=0, description="Telemetry records on disk while the broker is away, likewise."
    )
    flush_timeout_s: float = Field(
        30.0,
        ge=0,
        description="How long the end of a run may wait for the broker, in seconds; "
        "what is left then stays in the outbox for the next incarnation.",
    )
    metrics_host: str = Field("127.0.0.1", description="The address that metrics and readiness are served on.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Where Prometheus reads; 0 takes a free port, which the log names. A training script opens no port "
        "where it is not set; `esper train` takes a free one.",
    )
    outbox_max_pages: int | None = Field(
        None, ge=16, description="Size limit of the outbox in SQLite pages; as large as the disk where it is not set."
    )

    @property
    def metrics_address(self) -> MetricsAddress | None:
        """Where the trainer answers Prometheus; None where it does not."""
        if self.metrics_port is None:
            return None
        return MetricsAddress(self.metrics_host, self.metrics_port, "ESPER_TRAINER__LINK__METRICS_PORT")
