"""The closed vocabularies. A value on the wire is the lower-case word."""

from enum import StrEnum


class SeedStage(StrEnum):
    """Where a seed stands. ``schemas.lifecycle`` says which moves are allowed."""

    DORMANT = "dormant"
    GERMINATED = "germinated"
    TRAINING = "training"
    GRAFTING = "grafting"
    STABILIZING = "stabilizing"
    EVALUATING = "evaluating"
    FOSSILIZED = "fossilized"
    CANCELLED = "cancelled"
    CULLED = "culled"
    ROLLED_BACK = "rolled_back"


class TransitionReason(StrEnum):
    """Why a seed moved."""

    COMMAND = "command"
    SCHEDULE = "schedule"
    EVALUATION_TIMEOUT = "evaluation_timeout"
    FAILURE = "failure"
    EMBARGO_OVER = "embargo_over"
    ROLLBACK = "rollback"


class Action(StrEnum):
    """What Tamiyo can choose at a boundary."""

    WAIT = "wait"
    GERMINATE = "germinate"
    CULL = "cull"
    FOSSILIZE = "fossilize"


class RejectionReason(StrEnum):
    """Why a trainer refused a command."""

    STALE_INCARNATION = "stale_incarnation"
    EXPIRED = "expired"
    UNKNOWN_SEED = "unknown_seed"
    UNEXPECTED_STAGE = "unexpected_stage"
    KERNEL_UNAVAILABLE = "kernel_unavailable"
    KERNEL_INVALID = "kernel_invalid"
    DISK_FULL = "disk_full"


class BreakerState(StrEnum):
    """How a seed's circuit breaker stands: only an open one keeps the seed from running.

    After a while an open one is half open and tries the seed again: success closes it, failure opens it.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class RunStatus(StrEnum):
    """How a run stands; the last three end it."""

    RUNNING = "running"
    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


class LayerKind(StrEnum):
    """The layers that can hold seeds."""

    LINEAR = "linear"
    CONV2D = "conv2d"
    CONV1D = "conv1d"


class BlueprintStatus(StrEnum):
    """Where a blueprint stands in its life. ``schemas.verdicts`` folds it."""

    PROPOSED = "proposed"
    COMPILED = "compiled"
    CERTIFIED = "certified"
    REJECTED = "rejected"
    RETIRED = "retired"


class BlueprintChange(StrEnum):
    """What can be asked of a blueprint."""

    PROPOSE = "propose"
    COMPILE = "compile"
    CERTIFY = "certify"
    REJECT = "reject"
    RETIRE = "retire"


class Verdict(StrEnum):
    """What became of a requested blueprint change."""

    ACCEPTED = "accepted"
    WRONG_VERSION = "wrong_version"
    NOT_ALLOWED = "not_allowed"


class EvaluationVerdict(StrEnum):
    """What off-policy evaluation says of a version against another."""

    BETTER = "better"
    NOT_BETTER = "not_better"
    TOO_THIN = "too_thin"


class ReportMethod(StrEnum):
    """How the effect of an adaptation was estimated."""

    BEFORE_AFTER = "before_after"
    FORK = "fork"
