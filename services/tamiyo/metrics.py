"""Prometheus metrics and readiness of the controller."""

import time
from collections.abc import Callable, Sequence

from esper.metrics import Health, Kind, Problem, ProcessMetrics
from esper.schemas.events import DecisionMade
from esper.schemas.messages import OonaMessage

NOT_POLLED = "the projections have not been read yet; wait for the first poll"
DECISION_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class TamiyoMetrics(ProcessMetrics):
    """The metrics of one controller. It is ready while it can read the projections and write to Kafka."""

    def __init__(self, policy: str, version: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._problem = NOT_POLLED
        self._policy = (policy, str(version))
        self._load_problem: str | None = None
        self._num_pending: int | None = None
        self._polled_at: float | None = None
        health = Health(lambda: [Problem(reason) for reason in (self._problem, self._load_problem) if reason])
        super().__init__("tamiyo", health)
        self._create_metrics()

    def _create_metrics(self) -> None:
        meter = self.meter
        self._decisions = meter.counter(
            "esper_tamiyo_decisions_total",
            "Decisions recorded in Kafka; stale is true if the view was incomplete, which gives WAIT.",
            "action",
            "stale",
        )
        self._decision = meter.histogram(
            "esper_tamiyo_decision_seconds",
            "Time from the poll that found a boundary until Kafka has its decision and command.",
            "action",
            buckets=DECISION_S,
        )
        self._commands = meter.counter(
            "esper_tamiyo_commands_total",
            "Commands recorded in Kafka; resent is true for one sent again because the first was not confirmed.",
            "resent",
        )
        self._poll_failures = meter.counter(
            "esper_tamiyo_poll_failures_total",
            "Polls that failed because Postgres or Kafka was unavailable, by error.",
            "error",
        )
        self._failures = meter.counter(
            "esper_tamiyo_decision_failures_total",
            "Failures of one boundary, by step: building its view (view), deciding (policy), recording (record).",
            "step",
        )
        self._superseded = meter.counter(
            "esper_tamiyo_superseded_decisions_total",
            "Decisions that sent no command, because another controller decided first or a later poll sends it.",
        )
        self._loads = meter.counter(
            "esper_tamiyo_policy_loads_total",
            "Attempts to load the activated policy version, by outcome: loaded or failed.",
            "outcome",
        )
        meter.probe(
            Kind.GAUGE,
            "esper_tamiyo_policy_info",
            "Always 1; the labels name the policy that decides and its version.",
            lambda: {self._policy: 1.0},
            "policy",
            "version",
        )
        meter.probe(
            Kind.GAUGE,
            "esper_tamiyo_boundaries_pending",
            "Boundaries without a decision at the last poll.",
            lambda: self._num_pending,
        )
        meter.probe(
            Kind.GAUGE,
            "esper_tamiyo_poll_age_seconds",
            "Time since the last successful poll of the projections.",
            self._poll_age_s,
        )

    def boundaries_found(self, pending: Sequence[object]) -> None:
        """Set the number of undecided boundaries that a poll found."""
        self._num_pending = len(pending)

    def poll_succeeded(self) -> None:
        """Note a successful poll."""
        self._polled_at, self._problem = self._clock(), ""

    def poll_failed(self, error: BaseException) -> None:
        """Count a poll that failed because a service is unavailable."""
        self._problem = str(error) or type(error).__name__
        self._poll_failures.labels(type(error).__name__).inc()

    def decision_failed(self, step: str) -> None:
        """Count a failure at one boundary; ``step`` is view, policy or record."""
        self._failures.labels(step).inc()

    def decisions_superseded(self, count: int) -> None:
        """Count decisions that were not the first for their boundary, or not known to be."""
        self._superseded.inc(count)

    def policy_loaded(self, policy: str, version: int) -> None:
        """Note the version that decides from now on."""
        self._policy, self._load_problem = (policy, str(version)), None
        self._loads.labels("loaded").inc()

    def policy_confirmed(self) -> None:
        """Note that the version that decides is the activated one."""
        self._load_problem = None

    def policy_load_failed(self, problem: str) -> None:
        """Note why the activated version cannot be loaded; the previous one keeps deciding."""
        self._load_problem = problem
        self._loads.labels("failed").inc()

    def decision_recorded(self, decision: OonaMessage, seconds: float) -> None:
        """Count a decision that Kafka has; ``seconds`` since the poll that found its boundary."""
        event = decision.data
        assert isinstance(event, DecisionMade)
        self._decisions.labels(event.action, str(event.stale).lower()).inc()
        self._decision.labels(event.action).observe(seconds)

    def command_recorded(self, *, is_resent: bool) -> None:
        """Count a command that Kafka has."""
        self._commands.labels(str(is_resent).lower()).inc()

    def _poll_age_s(self) -> float | None:
        return None if self._polled_at is None else self._clock() - self._polled_at
