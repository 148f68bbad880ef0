"""Reports layer health: turns the measurements of the model's probe into events, with the step of the measurement.

Owns which steps are sampled and when signals are reported; ``esper.kasmina.health`` computes them. Invariant: signals
of the windows that a graph view at a boundary reads are reported before that boundary. Other signals are reported when
the device has sent them, one or more steps late.
"""

from collections.abc import Sequence

from esper.connection.events.journal import Journal
from esper.connection.events.telemetry_queue import TelemetryQueue
from esper.graph.health_windows import WINDOW_STEPS, last_complete_window
from esper.kasmina.health import Measured
from esper.kasmina.model import MorphableModel
from esper.logging import get_logger
from esper.schemas.events import LayerHealthMeasured

_log = get_logger(__name__)


class HealthReporter:
    """Reports the health of one incarnation's model. ``num_reported`` counts the events that were queued.

    Args:
        interval_steps: every so many optimizer steps one is sampled.
    """

    def __init__(self, model: MorphableModel, journal: Journal, telemetry: TelemetryQueue, interval_steps: int) -> None:
        self.num_reported = 0
        self._model, self._probe, self._journal, self._telemetry = model, model.probe, journal, telemetry
        self._interval_steps = interval_steps
        self._has_warned = False

    def begin_step(self, step: int) -> None:
        """Arm the probe if the step that begins is sampled."""
        if step % self._interval_steps == 0:
            self._probe.arm()

    def end_step(self, step: int, epoch: int, *, is_boundary: bool) -> None:
        """Collect the signals of a sampled step, and report those that the device has sent."""
        if self._probe.is_armed:
            self._probe.collect(step, epoch)
        self._report(self._probe.finished())
        if is_boundary:
            self._report(self._probe.drain(up_to_step=last_complete_window(step) + WINDOW_STEPS - 1))

    def report_pending(self) -> None:
        """Wait for pending signals and report them: a resumed run does not measure them again."""
        self._report(self._probe.drain())

    def stop(self) -> None:
        """Disarm the probe and report pending signals. Signals that a broken device has lost are counted as lost."""
        self._probe.disarm()
        try:
            self.report_pending()
        except RuntimeError as error:  # raised by a broken device; the end of the run must be recorded all the same
            lost = self._probe.forget()
            self._telemetry.count_lost(lost)
            _log.error("health.lost", run=self._journal.run_id, records=lost, error=str(error))

    def _report(self, measured: Sequence[Measured]) -> None:
        for step, epoch, layers in measured:
            for layer_id, signals in layers.items():
                self._model.state.set_health(self._model.layers[layer_id].index, [s.health_score for s in signals])
                message = self._journal.make(
                    LayerHealthMeasured, step=step, epoch=epoch, layer_id=layer_id, signals=signals
                )
                if self._telemetry.put(message):
                    self._journal.note(message)
                    self.num_reported += 1
            self._warn_of_silent_layers()

    def _warn_of_silent_layers(self) -> None:
        silent = self._probe.silent_layers
        if silent and not self._has_warned:
            self._has_warned = True
            _log.warning("layers.not_measured", run=self._journal.run_id, layers=silent)
