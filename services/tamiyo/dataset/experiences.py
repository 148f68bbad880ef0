"""Experiences: the view of a decision, the choice with its probability, and the reward.

Owns their form, their order and their digest; ``experience_join`` makes them from the log. Invariant: they are ordered
by (run, incarnation, boundary), never by the log, and the digest depends on nothing else.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload
from uuid import UUID

from esper.errors import ContractError, NewerVersionError
from esper.graph.graph_view import GraphView
from esper.schemas.enums import ReportMethod
from esper.services.tamiyo.control.recorded_view import unpack_view

Key = tuple[str, int, int]
"""(run, incarnation, boundary): names a boundary, which has one decision that counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionOutcome:
    """A decision and its reward, without the view.

    Attributes:
        chosen: index among ``legal_choices(view)``.
        probability: of the choice under the behaviour policy, in (0, 1].
        reward: in units of the metric; 0 by definition for WAIT.
        reward_variance: of the reward's estimate; None for WAIT, and if the report has none.
        method: how the reward was estimated; None for WAIT.
        is_placebo: the germinated kernel is a `noop`, which adds nothing: the reward is 0 by definition.
    """

    run_id: str
    incarnation: int
    boundary: int
    step: int
    chosen: int
    probability: float
    policy_id: str
    policy_version: int
    reward: float
    reward_variance: float | None
    method: ReportMethod | None
    decision_id: UUID
    is_placebo: bool = False

    @property
    def key(self) -> Key:
        """The boundary."""
        return (self.run_id, self.incarnation, self.boundary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(DecisionOutcome):
    """A decision with its view."""

    view: GraphView


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredExperience(DecisionOutcome):
    """A decision with its view as the log has it: a few kilobytes, where the objects of a view take hundreds.

    ``view_digest`` is the SHA-256 of the view's bytes, ``view_zstd`` the compressed bytes.
    """

    view_digest: str
    view_zstd: bytes = field(repr=False)

    def canonical(self) -> bytes:
        """Return one line of JSON: sorted keys, numbers in their shortest exact form, the digest for the view."""
        fields: dict[str, Any] = {n: getattr(self, n) for n in self.__dataclass_fields__ if n != "view_zstd"}
        fields["decision_id"] = str(self.decision_id)
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def to_experience(self) -> Experience:
        """Unpack the view.

        Raises:
            ContractError: the view is damaged, or has another digest.
            NewerVersionError: a newer program wrote the view.
        """
        try:
            view = unpack_view(self.view_zstd, self.view_digest)
        except NewerVersionError:
            raise
        except ContractError as error:
            raise ContractError(f"the view of boundary {self.key} cannot be read: {error}; replay again") from None
        fields = {n: getattr(self, n) for n in DecisionOutcome.__dataclass_fields__}
        return Experience(view=view, **fields)


class Experiences(Sequence[Experience]):
    """Experiences in their canonical order. Views are unpacked on access and not kept.

    Raises:
        ValueError: two belong to one boundary.
    """

    def __init__(self, stored: Iterable[StoredExperience]) -> None:
        self.stored: tuple[StoredExperience, ...] = tuple(sorted(stored, key=lambda e: e.key))
        for before, after in zip(self.stored, self.stored[1:], strict=False):
            if before.key == after.key:
                raise ValueError(f"two experiences of boundary {after.key}")

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, index: int) -> Experience: ...
    @overload
    def __getitem__(self, index: slice) -> "Experiences": ...
    def __getitem__(self, index: int | slice) -> "Experience | Experiences":
        return Experiences(self.stored[index]) if isinstance(index, slice) else self.stored[index].to_experience()

    def __iter__(self) -> Iterator[Experience]:
        return (one.to_experience() for one in self.stored)

    def of_runs(self, runs: Iterable[str]) -> "Experiences":
        """Return the experiences of some runs."""
        wanted = set(runs)
        return Experiences(e for e in self.stored if e.run_id in wanted)

    @property
    def runs(self) -> tuple[str, ...]:
        """The ids of the runs, in order."""
        return tuple(dict.fromkeys(e.run_id for e in self.stored))

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the canonical lines in order, each followed by a newline."""
        found = hashlib.sha256()
        for one in self.stored:
            found.update(one.canonical() + b"\n")
        return found.hexdigest()
