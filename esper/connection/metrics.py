"""What a trainer shows to Prometheus, if it is asked to: read from the run when Prometheus comes, never in a step."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from esper.connection.events.field_reports import AdaptationBook
from esper.connection.events.telemetry_queue import TelemetryQueue
from esper.kasmina.model import MorphableModel
from esper.metrics import Health, Kind, Meter, MetricsServer, ProcessMetrics, client_metrics
from esper.oona.outbox.outbox_store import Outbox
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import STAGES


class Progress(Protocol):
    """How far a run is."""

    run_id: str
    step_number: int
    epoch: int
    overhead_s: float

    @property
    def incarnation(self) -> int: ...


class RunParts(NamedTuple):
    """What of a run is looked at. All of it may be read from another thread."""

    progress: Progress
    model: MorphableModel
    outbox: Outbox
    spill: Outbox
    telemetry: TelemetryQueue
    book: AdaptationBook
    commands: Counter[str]
    health: Health


class TrainerMetrics(ProcessMetrics):
    """The metrics of one run's process. It is ready while Kafka takes what the run tells.

    Args:
        first_step: the step at which this process took the run up.
    """

    def __init__(self, parts: RunParts, first_step: int) -> None:
        self._parts, self._first_step = parts, first_step
        self.meter = Meter()
        client_metrics.show_build(self.meter, "trainer")
        self._show_run()
        self._show_events()
        self.meter.include(client_metrics.METER)
        self._server = MetricsServer(self.meter.registry, parts.health)

    def _show_run(self) -> None:
        progress, model, book = self._parts.progress, self._parts.model, self._parts.book
        self.meter.probe(
            Kind.GAUGE,
            "esper_trainer_run_info",
            "1, for the run of this process.",
            lambda: {(progress.run_id, str(progress.incarnation)): 1.0},
            "run",
            "incarnation",
        )
        self._count("steps_total", "Optimizer steps in this process.", lambda: progress.step_number - self._first_step)
        self._show("step", "The step that the run is at.", lambda: progress.step_number)
        self._show("epoch", "Epochs that the run has completed.", lambda: progress.epoch)
        self._count(
            "overhead_seconds_total", "Time that Esper took from the training loop.", lambda: progress.overhead_s
        )
        self._show("adaptations", "Seeds that the run has germinated.", lambda: book.num_adaptations)
        self._show("grown_parameters", "Parameters of all awake and fossilized seeds.", lambda: _grown(model))
        self._show_by("seeds", "Seeds by the stage that they are in.", "stage", lambda: _stages(model))

    def _show_events(self) -> None:
        parts, telemetry = self._parts, self._parts.telemetry
        self.meter.probe(
            Kind.COUNTER,
            "esper_trainer_commands_total",
            "Commands dealt with, by outcome: applied, or why not.",
            lambda: {(outcome,): float(count) for outcome, count in list(parts.commands.items())},
            "outcome",
        )
        self._show("outbox_records", "Events on this disk that Kafka has not taken yet.", lambda: len(parts.outbox))
        self._show("telemetry_queued_records", "Telemetry in memory.", lambda: telemetry.num_queued)
        self._show("telemetry_spilled_records", "Telemetry on this disk.", lambda: len(parts.spill))
        self._count("telemetry_spilled_total", "Telemetry that went to the disk first.", lambda: telemetry.num_spilled)
        self._count("telemetry_lost_total", "Telemetry dropped for want of room.", lambda: telemetry.num_lost_ever)
        self._count("telemetry_gaps_total", "Events that told of dropped telemetry.", lambda: telemetry.num_gaps_told)

    def _show(self, name: str, help: str, read: Callable[[], float | None]) -> None:
        self.meter.probe(Kind.GAUGE, f"esper_trainer_{name}", help, read)

    def _count(self, name: str, help: str, read: Callable[[], float | None]) -> None:
        self.meter.probe(Kind.COUNTER, f"esper_trainer_{name}", help, read)

    def _show_by(self, name: str, help: str, label: str, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        self.meter.probe(Kind.GAUGE, f"esper_trainer_{name}", help, read, label)


def _grown(model: MorphableModel) -> float | None:
    try:
        return model.num_parameters_grown
    except RuntimeError:  # a seed came or went while its parameters were counted
        return None


def _stages(model: MorphableModel) -> dict[tuple[str, ...], float]:
    counts = np.bincount(model.state.stage.ravel(), minlength=len(STAGES))
    found: dict[tuple[str, ...], float] = {(str(stage),): float(n) for stage, n in zip(STAGES, counts, strict=True)}
    # the arrays are as wide as the widest layer; what lies beyond a layer's own seeds counts as dormant there
    num_beyond = model.state.stage.size - sum(handle.num_seeds for handle in model.layers.values())
    found[str(SeedStage.DORMANT),] -= num_beyond
    return found
