"""Reads policies: trained versions, their evaluations, and which version is active since when.

The events of one policy are in one partition, those of two policies may be in two. Of two activations the one with
the later broker time wins.
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

MAX_CHANGES = 1_000
"""The maximum number of changes to read, newest first."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The blob in S3 with the weights of a trained version."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A version, as a controller loads it. Parameters of the activation override those of the training."""

    policy_id: str
    version: int
    kind: str
    parameters: dict[str, Scalar]
    weights: Weights | None = None

    def __str__(self) -> str:
        return f"{self.policy_id} v{self.version}"


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """An activation: from ``since`` (broker time) on, ``version`` decides.

    Attributes:
        by_settings: a controller with a fixed policy reported itself; no other controller follows it.
        rolled_back_from: (policy, version) if the activation is a rollback.
    """

    id: UUID
    version: PolicyVersion
    since: datetime
    reason: str
    by_settings: bool
    rolled_back_from: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class TrainedVersion:
    """A trained version, with its origin and its training figures."""

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
    """The evaluation of a version against another; ``low`` and ``high`` bound ``estimate`` with ``confidence``."""

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
    """The action of a decision, and the field report of its fork."""

    action: Action
    report: FieldReported

    @property
    def is_placebo(self) -> bool:
        """Whether the seed grew a ``noop`` kernel, which adds nothing."""
        return self.report.fork is not None and self.report.fork.is_placebo


async def forked_decisions(connection: Connection, change: PolicyChange) -> list[ForkedDecision]:
    """The forked decisions of a version since its activation, with their field reports; sorted by run."""
    version = change.version
    version_since = {"policy_id": version.policy_id, "policy_version": version.version, "since": change.since}
    found = []
    async for row in queries("policies").forked(connection, **version_since):
        fields = dict(row)
        action = Action(fields.pop("action"))
        fork = {name: fields.pop(name) for name in ForkedPair.model_fields}
        found.append(ForkedDecision(action, FieldReported.model_validate({**fields, "fork": fork})))
    return found


async def active_policy(connection: Connection) -> PolicyChange | None:
    """The newest activation that is not by settings; None if there is none."""
    found = await policy_changes(connection, num=1)
    return found[0] if found else None


async def policy_changes(
    connection: Connection, *, num: int = MAX_CHANGES, include_by_settings: bool = False
) -> list[PolicyChange]:
    """Activations and rollbacks, newest first."""
    found = queries("policies").changes(connection, num=num, include_by_settings=include_by_settings)
    return [_change(r) async for r in found]


async def trained_versions(connection: Connection) -> list[TrainedVersion]:
    """Every trained version, sorted by policy and version."""
    return [_trained(r) async for r in queries("policies").versions(connection)]


async def evaluations(connection: Connection) -> list[Evaluation]:
    """Every evaluation, sorted by policy and log position."""
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
