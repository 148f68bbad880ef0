"""Health in a run: what the model's probe measured becomes events and state, each with the step it was measured at.

Owns when a step is sampled and when its signals are told; esper.kasmina.health has the signals.
Invariant: signals of windows that a view at a boundary reads are told before that boundary. All
others are told when the device has sent them, one or more steps late.
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
    """The probe of one incarnation. ``num_told`` counts the records that were queued."""

    def __init__(self, model: MorphableModel, journal: Journal, telemetry: TelemetryQueue, every_steps: int) -> None:
        self.num_told = 0
        self._model, self._probe, self._journal, self._telemetry = model, model.probe, journal, telemetry
        self._every_steps = every_steps
        self._has_named_silent = False

    def begin_step(self, step: int) -> None:
        """Watch the passes of a step that is about to begin, if it is sampled."""
        if step % self._every_steps == 0:
            self._probe.arm()

    def end_step(self, step: int, epoch: int, *, is_boundary: bool) -> None:
        """Take the signals of a step that was watched, and tell what has arrived."""
        if self._probe.is_armed:
            self._probe.collect(step, epoch)
        self._tell(self._probe.finished())
        if is_boundary:
            self._tell(self._probe.drain(up_to_step=last_complete_window(step) + WINDOW_STEPS - 1))

    def tell_rest(self) -> None:
        """Wait for what is under way, and tell it: a resumed run does not measure the steps before its checkpoint."""
        self._tell(self._probe.drain())

    def stop(self) -> None:
        """Stop watching, and tell the rest. A device that broke takes it along: that is counted as lost."""
        self._probe.disarm()
        try:
            self.tell_rest()
        except RuntimeError as error:  # whatever a broken device raises; why the run ends must still be told
            lost = self._probe.forget()
            self._telemetry.lose(lost)
            _log.error("health.lost", run=self._journal.run_id, records=lost, error=str(error))

    def _tell(self, measured: Sequence[Measured]) -> None:
        for step, epoch, layers in measured:
            for layer_id, signals in layers.items():
                self._model.state.set_health(self._model.layers[layer_id].index, [s.health_score for s in signals])
                message = self._journal.make(
                    LayerHealthMeasured, step=step, epoch=epoch, layer_id=layer_id, signals=signals
                )
                if self._telemetry.put(message):
                    self._journal.note(message)
                    self.num_told += 1
            self._name_silent_layers()

    def _name_silent_layers(self) -> None:
        silent = self._probe.silent_layers
        if silent and not self._has_named_silent:
            self._has_named_silent = True
            _log.warning("layers.not_measured", run=self._journal.run_id, layers=silent)
