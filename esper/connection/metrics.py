"""Prometheus metrics of a trainer. They are read from the run at each scrape and cost a training step nothing."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from esper.connection.events.field_reports import AdaptationLedger
from esper.connection.events.telemetry_queue import TelemetryQueue
from esper.connection.run_handle import RunHandle
from esper.kasmina.model import MorphableModel
from esper.metrics import Health, Kind, ProcessMetrics
from esper.oona.outbox.outbox_store import Outbox
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import STAGES


class RunParts(NamedTuple):
    """The parts of a run that metrics read; all may be read from another thread."""

    run: RunHandle
    model: MorphableModel
    outbox: Outbox
    spill: Outbox
    telemetry: TelemetryQueue
    ledger: AdaptationLedger
    commands: Counter[str]
    health: Health


class TrainerMetrics(ProcessMetrics):
    """The metrics of one trainer process. It is ready while Kafka accepts the run's events.

    Args:
        first_step: the step at which this process started or resumed the run.
    """

    def __init__(self, parts: RunParts, first_step: int) -> None:
        self._parts, self._first_step = parts, first_step
        super().__init__("trainer", parts.health)
        self._add_run_metrics()
        self._add_event_metrics()

    def _add_run_metrics(self) -> None:
        run, model, ledger = self._parts.run, self._parts.model, self._parts.ledger
        self.meter.probe(
            Kind.GAUGE,
            "esper_trainer_run_info",
            "Always 1; the labels name the run and its incarnation.",
            lambda: {(run.run_id, str(run.incarnation)): 1.0},
            "run",
            "incarnation",
        )
        self._counter("steps_total", "Optimizer steps of this process.", lambda: run.step_number - self._first_step)
        self._gauge("step", "Current optimizer step of the run.", lambda: run.step_number)
        self._gauge("epoch", "Completed epochs of the run.", lambda: run.epoch)
        self._counter("overhead_seconds_total", "Time that Esper used in the training loop.", lambda: run.overhead_s)
        self._gauge("adaptations", "Germinations since the run began.", lambda: ledger.num_adaptations)
        self._gauge("grown_parameters", "Parameters of all active and fossilized seeds.", lambda: _grown(model))
        self.meter.probe(Kind.GAUGE, "esper_trainer_seeds", "Seeds by stage.", lambda: _stages(model), "stage")

    def _add_event_metrics(self) -> None:
        parts, telemetry = self._parts, self._parts.telemetry
        self.meter.probe(
            Kind.COUNTER,
            "esper_trainer_commands_total",
            "Commands handled, by outcome: applied, or the reason of the rejection.",
            lambda: {(outcome,): float(count) for outcome, count in list(parts.commands.items())},
            "outcome",
        )
        self._gauge(
            "outbox_records", "Events in the outbox on disk that Kafka has not acknowledged.", lambda: len(parts.outbox)
        )
        self._gauge("telemetry_queued_records", "Telemetry records that wait in memory.", lambda: telemetry.num_queued)
        self._gauge("telemetry_spilled_records", "Telemetry records that wait on disk.", lambda: len(parts.spill))
        self._counter(
            "telemetry_spilled_total",
            "Telemetry records that were written to disk because Kafka was unavailable.",
            lambda: telemetry.num_spilled,
        )
        self._counter(
            "telemetry_lost_total",
            "Telemetry records dropped because queue and disk were full.",
            lambda: telemetry.num_lost_total,
        )
        self._counter("telemetry_gap_events_total", "Telemetry-lost events sent.", lambda: telemetry.num_gaps_recorded)

    def _gauge(self, name: str, help: str, read: Callable[[], float | None]) -> None:
        self.meter.probe(Kind.GAUGE, f"esper_trainer_{name}", help, read)

    def _counter(self, name: str, help: str, read: Callable[[], float | None]) -> None:
        self.meter.probe(Kind.COUNTER, f"esper_trainer_{name}", help, read)


def _grown(model: MorphableModel) -> float | None:
    try:
        return model.num_parameters_grown
    except RuntimeError:  # a seed was added or removed during the count
        return None


def _stages(model: MorphableModel) -> dict[tuple[str, ...], float]:
    counts = np.bincount(model.state.stage.ravel(), minlength=len(STAGES))
    found: dict[tuple[str, ...], float] = {(str(stage),): float(n) for stage, n in zip(STAGES, counts, strict=True)}
    # the arrays are as wide as the layer with most seeds; the padding of other layers counts as dormant
    num_padding = model.state.stage.size - sum(handle.num_seeds for handle in model.layers.values())
    found[str(SeedStage.DORMANT),] -= num_padding
    return found
