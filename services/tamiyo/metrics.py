"""What Tamiyo shows to Prometheus."""

import time
from collections.abc import Callable, Sequence

from esper.metrics import Health, Kind, Meter, MetricsServer, Problem, ProcessMetrics, client_metrics
from esper.schemas.events import DecisionMade
from esper.schemas.messages import OonaMessage

NOTHING_READ = "the projections have not been read yet"
DECISION_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class TamiyoMetrics(ProcessMetrics):
    """The metrics of one controller. It is ready while the projections and Kafka answer it."""

    def __init__(self, policy: str, version: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._problem = NOTHING_READ
        self._policy = (policy, str(version))
        self._not_loaded: str | None = None
        self._num_pending: int | None = None
        self._looked_at: float | None = None
        self.health = Health(lambda: [Problem(told) for told in (self._problem, self._not_loaded) if told])
        self.meter = self._make_meter()
        self._server = MetricsServer(self.meter.registry, self.health)

    def _make_meter(self) -> Meter:
        meter = Meter()
        client_metrics.show_build(meter, "tamiyo")
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
            "esper_tamiyo_poll_failures_total", "Looks that failed because something was away.", "error"
        )
        self._broken = meter.counter(
            "esper_tamiyo_decision_failures_total",
            "Times that one boundary's view could not be made (view), decided on (policy) or recorded (record).",
            "what",
        )
        self._seconds = meter.counter(
            "esper_tamiyo_superseded_decisions_total",
            "Decisions whose command was left to another controller's, which was first in the log, or to a later look.",
        )
        self._swaps = meter.counter(
            "esper_tamiyo_policy_loads_total",
            "Versions that the log named as active, and what became of it: loaded, failed.",
            "outcome",
        )
        meter.probe(
            Kind.GAUGE,
            "esper_tamiyo_policy_info",
            "1, for the policy that decides.",
            lambda: {self._policy: 1.0},
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
            Kind.GAUGE, "esper_tamiyo_poll_age_seconds", "How long ago the last look succeeded.", self._look_age_s
        )
        meter.include(client_metrics.METER)
        return meter

    def boundaries_found(self, pending: Sequence[object]) -> None:
        """The boundaries that a look found."""
        self._num_pending = len(pending)

    def poll_succeeded(self) -> None:
        """A look came to its end."""
        self._looked_at, self._problem = self._clock(), ""

    def poll_failed(self, error: BaseException) -> None:
        """A look did not: something is away."""
        self._problem = str(error) or type(error).__name__
        self._retries.labels(type(error).__name__).inc()

    def decision_failed(self, what: str) -> None:
        """One boundary could not be decided as it should be; the others were."""
        self._broken.labels(what).inc()

    def decisions_superseded(self, count: int) -> None:
        """So many decisions were not the first in the log, or not known to be."""
        self._seconds.inc(count)

    def policy_loaded(self, policy: str, version: int) -> None:
        """This version decides from here on."""
        self._policy, self._not_loaded = (policy, str(version)), None
        self._swaps.labels("loaded").inc()

    def policy_confirmed(self) -> None:
        """Who decides is who the log names."""
        self._not_loaded = None

    def policy_load_failed(self, problem: str) -> None:
        """The version that the log names cannot be loaded; another one goes on deciding."""
        self._not_loaded = problem
        self._swaps.labels("failed").inc()

    def decision_recorded(self, decision: OonaMessage, seconds: float) -> None:
        """A decision is in the log, and its command if it has one."""
        event = decision.data
        assert isinstance(event, DecisionMade)
        self._decisions.labels(event.action, str(event.stale).lower()).inc()
        self._decision.labels(event.action).observe(seconds)

    def command_recorded(self, *, is_resent: bool) -> None:
        """A command is in the log."""
        self._commands.labels(str(is_resent).lower()).inc()

    def _look_age_s(self) -> float | None:
        return None if self._looked_at is None else self._clock() - self._looked_at
