"""What Tamiyo shows to Prometheus."""

import time
from collections.abc import Callable, Sequence

from esper.metrics import Health, Kind, Meter, MetricsServer, Problem, ShownMetrics, clients
from esper.schemas.events import DecisionMade
from esper.schemas.messages import OonaMessage

NOTHING_READ = "the projections have not been read yet"
DECISION_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class TamiyoMetrics(ShownMetrics):
    """The metrics of one controller. It is ready while the projections and Kafka answer it."""

    def __init__(self, policy: str, version: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._problem = NOTHING_READ
        self._num_pending: int | None = None
        self._looked_at: float | None = None
        self.health = Health(lambda: [Problem(self._problem)] if self._problem else [])
        self.meter = self._make_meter(policy, version)
        self._server = MetricsServer(self.meter.registry, self.health)

    def _make_meter(self, policy: str, version: int) -> Meter:
        meter = Meter()
        clients.show_build(meter, "tamiyo")
        self._decisions = meter.counter(
            "esper_tamiyo_decisions_total",
            "Decisions in the log; stale: the views were not complete.",
            "action",
            "stale",
        )
        self._decision = meter.histogram(
            "esper_tamiyo_decision_seconds",
            "From the first look that found a boundary to its decision and command in the log.",
            "action",
            buckets=DECISION_S,
        )
        self._commands = meter.counter(
            "esper_tamiyo_commands_total",
            "Commands in the log; resent: the first one was not seen to arrive.",
            "resent",
        )
        self._retries = meter.counter(
            "esper_tamiyo_retries_total", "Looks that failed because something was away.", "error"
        )
        labels = (policy, str(version))
        meter.probe(
            Kind.GAUGE,
            "esper_tamiyo_policy_info",
            "1, for the policy that decides.",
            lambda: {labels: 1.0},
            "policy",
            "version",
        )
        meter.probe(
            Kind.GAUGE,
            "esper_tamiyo_boundaries_pending",
            "Boundaries without a decision, as of the last look.",
            lambda: self._num_pending,
        )
        meter.probe(
            Kind.GAUGE, "esper_tamiyo_look_age_seconds", "How long ago the last look succeeded.", self._look_age_s
        )
        meter.include(clients.METER)
        return meter

    def found(self, pending: Sequence[object]) -> None:
        """The boundaries that a look found."""
        self._num_pending = len(pending)

    def looked(self) -> None:
        """A look came to its end."""
        self._looked_at, self._problem = self._clock(), ""

    def failed(self, error: BaseException) -> None:
        """A look did not: something is away."""
        self._problem = str(error) or type(error).__name__
        self._retries.labels(type(error).__name__).inc()

    def decided(self, decision: OonaMessage, seconds: float) -> None:
        """A decision is in the log, and its command if it has one."""
        event = decision.data
        assert isinstance(event, DecisionMade)
        self._decisions.labels(event.action, str(event.stale).lower()).inc()
        self._decision.labels(event.action).observe(seconds)

    def commanded(self, *, is_resent: bool) -> None:
        """A command is in the log."""
        self._commands.labels(str(is_resent).lower()).inc()

    def _look_age_s(self) -> float | None:
        return None if self._looked_at is None else self._clock() - self._looked_at
