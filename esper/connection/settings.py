"""How a trainer is linked: boundaries, sampling, limits."""

from pathlib import Path

from pydantic import Field

from esper.config import SectionModel

OUTBOX_FILE, SPILL_FILE = "outbox.sqlite", "telemetry.sqlite"


class LinkOptions(SectionModel):
    """Options of ``esper.connect``.

    ``boundary_steps``: commands are applied and stages advance every so many steps.
    ``health_every_steps``: how often health is taken.
    ``max_queued_telemetry``: records in memory before the newest are dropped and counted.
    ``max_spilled_telemetry``: records on disk while the broker is away, likewise.
    ``flush_timeout_s``: how long the end of a run may wait for the broker; what is left then
    stays in the outbox for the next incarnation.
    """

    boundary_steps: int = Field(50, ge=1)
    health_every_steps: int = Field(10, ge=1)
    metric: str = "val_accuracy"
    folder: Path = Path("runs")
    max_queued_telemetry: int = Field(10_000, ge=1)
    max_spilled_telemetry: int = Field(100_000, ge=0)
    flush_timeout_s: float = Field(30.0, ge=0)
    outbox_max_pages: int | None = Field(None, ge=16)
