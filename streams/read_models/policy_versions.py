"""What the projections know of policies: the versions, what evaluation says of them, and which decides since when.

Each policy's events are in one partition, and the one that decides may be of any: of two changes the one that the
broker took later counts.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from esper.schemas.base import Scalar
from esper.schemas.enums import Action, EvaluationVerdict
from esper.schemas.events.seeds import FieldReported, ForkedPair
from esper.streams.database.connection_types import Connection
from esper.streams.database.sql_queries import queries

MANY = 1_000
"""Changes that are read at most; the newest."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A blob in S3: what a trained version is made of."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """What acting by a version takes. ``parameters`` are those of its training, then those of its activation."""

    policy_id: str
    version: int
    kind: str
    parameters: dict[str, Scalar]
    weights: Weights | None = None

    def __str__(self) -> str:
        return f"{self.policy_id} v{self.version}"


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """From ``since`` on ``version`` decides. ``rolled_back_from`` is (policy, version) where it was a rollback.

    ``by_settings``: a controller with a fixed policy told of itself; no other one follows it.
    """

    id: UUID
    version: PolicyVersion
    since: datetime
    reason: str
    by_settings: bool
    rolled_back_from: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class TrainedVersion:
    """A version in the log, with where it came from and what was measured of it."""

    version: PolicyVersion
    parent_version: int | None
    data: list[dict[str, Any]]
    times_ms: tuple[int | None, int | None]
    num_decisions: int
    figures: dict[str, Scalar | None]
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found of a version against another; ``low`` and ``high`` bound ``estimate`` with ``confidence``."""

    policy_id: str
    policy_version: int
    against_policy_id: str
    against_version: int
    estimator: str
    estimate: float | None
    low: float | None
    high: float | None
    confidence: float
    effective_sample_size: float
    num_decisions: int
    held_out_runs: tuple[str, ...]
    verdict: EvaluationVerdict
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class ForkedDecision:
    """A decision of a version, and the report of its fork."""

    action: Action
    report: FieldReported

    @property
    def is_placebo(self) -> bool:
        """Whether what was grown adds nothing."""
        return self.report.fork is not None and self.report.fork.is_placebo


async def forked_decisions(connection: Connection, change: PolicyChange) -> list[ForkedDecision]:
    """What the version of a change decided since, as far as forks have measured it; by run."""
    version = change.version
    of = {"policy_id": version.policy_id, "policy_version": version.version, "since": change.since}
    found = []
    async for row in queries("policies").forked(connection, **of):
        told = dict(row)
        action = Action(told.pop("action"))
        fork = {name: told.pop(name) for name in ForkedPair.model_fields}
        found.append(ForkedDecision(action, FieldReported.model_validate({**told, "fork": fork})))
    return found


async def active_policy(connection: Connection) -> PolicyChange | None:
    """The newest change that others follow; None where nothing was ever activated."""
    found = await policy_changes(connection, num=1)
    return found[0] if found else None


async def policy_changes(
    connection: Connection, *, num: int = MANY, include_by_settings: bool = False
) -> list[PolicyChange]:
    """Who decided, the newest first."""
    found = queries("policies").changes(connection, num=num, include_by_settings=include_by_settings)
    return [_change(r) async for r in found]


async def trained_versions(connection: Connection) -> list[TrainedVersion]:
    """Every version that was trained, by policy and number."""
    return [_trained(r) async for r in queries("policies").versions(connection)]


async def evaluations(connection: Connection) -> list[Evaluation]:
    """Everything that was found of versions; those of one policy in the order of the log."""
    found = [dict(r) async for r in queries("policies").evaluations(connection)]
    return [
        Evaluation(
            **{
                **row,
                "verdict": EvaluationVerdict(row["verdict"]),
                "held_out_runs": tuple(json.loads(row["held_out_runs"])),
            }
        )
        for row in found
    ]


def _change(row: Any) -> PolicyChange:
    parameters = json.loads(row["trained_parameters"] or "{}") | json.loads(row["parameters"])
    digest, size = row["weights_sha256"], row["weights_size_bytes"]
    return PolicyChange(
        id=row["activation_id"],
        version=PolicyVersion(
            row["policy_id"], row["policy_version"], row["kind"], parameters, Weights(digest, size) if digest else None
        ),
        since=row["since"],
        reason=row["reason"],
        by_settings=row["by_settings"],
        rolled_back_from=None if row["from_policy_id"] is None else (row["from_policy_id"], row["from_version"]),
    )


def _trained(row: Any) -> TrainedVersion:
    weights = Weights(row["weights_sha256"], row["weights_size_bytes"])
    return TrainedVersion(
        version=PolicyVersion(
            row["policy_id"], row["policy_version"], row["kind"], json.loads(row["parameters"]), weights
        ),
        parent_version=row["parent_version"],
        data=json.loads(row["data"]),
        times_ms=(row["from_time_ms"], row["until_time_ms"]),
        num_decisions=row["num_decisions"],
        figures=json.loads(row["figures"]),
        reason=row["reason"],
        at=row["at"],
    )
