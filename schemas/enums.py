"""The closed vocabularies of the contracts. The wire form of a value is its lower-case name."""

from enum import StrEnum


class SeedStage(StrEnum):
    """The stage of a seed. ``schemas.lifecycle`` has the allowed transitions."""

    DORMANT = "dormant"
    GERMINATED = "germinated"
    TRAINING = "training"
    GRAFTING = "grafting"
    STABILIZING = "stabilizing"
    EVALUATING = "evaluating"
    FOSSILIZED = "fossilized"
    CANCELLED = "cancelled"
    CULLED = "culled"
    ROLLED_BACK = "rolled_back"  # released, but no program writes it


class TransitionReason(StrEnum):
    """Why a seed changed its stage."""

    COMMAND = "command"
    SCHEDULE = "schedule"
    EVALUATION_TIMEOUT = "evaluation_timeout"
    FAILURE = "failure"
    EMBARGO_OVER = "embargo_over"
    ROLLBACK = "rollback"  # released, but no program writes it


class Action(StrEnum):
    """The actions that Tamiyo can choose at a boundary."""

    WAIT = "wait"
    GERMINATE = "germinate"
    CULL = "cull"
    FOSSILIZE = "fossilize"


class RejectionReason(StrEnum):
    """Why a trainer rejected a command."""

    STALE_INCARNATION = "stale_incarnation"
    EXPIRED = "expired"
    UNKNOWN_SEED = "unknown_seed"
    UNEXPECTED_STAGE = "unexpected_stage"
    KERNEL_UNAVAILABLE = "kernel_unavailable"
    KERNEL_INVALID = "kernel_invalid"
    DISK_FULL = "disk_full"  # released, but no program writes it


class BreakerState(StrEnum):
    """The state of a seed's circuit breaker. Only an open breaker keeps the seed from running.

    After a while an open breaker becomes half open and tries the seed once: success closes it, failure opens it again.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class RunStatus(StrEnum):
    """The status of a run; the last three are final."""

    RUNNING = "running"
    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


class LayerKind(StrEnum):
    """The kinds of layers that can hold seeds."""

    LINEAR = "linear"
    CONV2D = "conv2d"
    CONV1D = "conv1d"


class BlueprintStatus(StrEnum):
    """The status of a blueprint. ``schemas.change_verdicts`` computes it."""

    PROPOSED = "proposed"
    COMPILED = "compiled"
    CERTIFIED = "certified"
    REJECTED = "rejected"
    RETIRED = "retired"


class BlueprintChange(StrEnum):
    """The changes that can be requested of a blueprint."""

    PROPOSE = "propose"
    COMPILE = "compile"
    CERTIFY = "certify"
    REJECT = "reject"
    RETIRE = "retire"


class Verdict(StrEnum):
    """The verdict on a requested blueprint change."""

    ACCEPTED = "accepted"
    WRONG_VERSION = "wrong_version"
    NOT_ALLOWED = "not_allowed"


class EvaluationVerdict(StrEnum):
    """The result of off-policy evaluation of one policy version against another."""

    BETTER = "better"
    NOT_BETTER = "not_better"
    TOO_THIN = "too_thin"


class ReportMethod(StrEnum):
    """How the effect of an adaptation was estimated."""

    BEFORE_AFTER = "before_after"
    FORK = "fork"
