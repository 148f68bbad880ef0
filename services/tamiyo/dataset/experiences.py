"""Experiences: what a decision saw, what it chose with which probability, and what came of it.

Owns their form, their order and their digest; ``esper.services.tamiyo.replaying`` makes them from the log. Invariant:
the order is that of (run, incarnation, boundary), never that of the log, and the digest depends on nothing else.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload
from uuid import UUID

import zstandard

from esper.errors import ContractError
from esper.graph.graph_view import GraphView, digest_of
from esper.schemas.enums import ReportMethod

Key = tuple[str, int, int]
"""(run, incarnation, boundary): one boundary, one decision that counts."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One decision and its reward.

    Attributes:
        chosen: index among ``legal_choices(view)``.
        probability: of what was chosen, under the policy that acted, in (0, 1].
        reward: in units of the metric; 0 by definition where the decision was to wait.
        reward_variance: of the reward's estimate; None where the report does not tell it, and of WAIT.
        method: how the reward was estimated; None for WAIT.
        is_placebo: nothing was added: the reward is 0 by definition, and that it does not help is known beforehand.
    """

    run_id: str
    incarnation: int
    boundary: int
    step: int
    view: GraphView
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
        """Which boundary it was."""
        return (self.run_id, self.incarnation, self.boundary)


@dataclass(frozen=True, slots=True)
class StoredExperience:
    """An experience with its view as it lies in the log: a few kilobytes, where the objects of a view take hundreds.

    ``view_digest`` is the SHA-256 of the view's bytes, ``view_zstd`` those bytes compressed.
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
    view_digest: str
    view_zstd: bytes = field(repr=False)
    is_placebo: bool = False

    @property
    def key(self) -> Key:
        """Which boundary it was."""
        return (self.run_id, self.incarnation, self.boundary)

    def canonical(self) -> bytes:
        """One line of JSON: keys sorted, numbers in their shortest exact form, the view by its digest."""
        told: dict[str, Any] = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("view_zstd", "decision_id")
        }
        told["decision_id"] = str(self.decision_id)
        return json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    def opened(self) -> Experience:
        """With the view as objects.

        Raises:
            ContractError: the view's bytes are not those of its digest.
        """
        try:
            data = zstandard.decompress(self.view_zstd)
        except zstandard.ZstdError as error:
            raise ContractError(f"the view of boundary {self.key} cannot be read: {error}; replay again") from None
        if digest_of(data) != self.view_digest:
            raise ContractError(f"the view of boundary {self.key} was altered: replay again")
        view = GraphView.from_bytes(data)
        fields = {n: getattr(self, n) for n in self.__dataclass_fields__ if n not in ("view_digest", "view_zstd")}
        return Experience(view=view, **fields)


class Experiences(Sequence[Experience]):
    """Experiences in their one order. Views are opened as they are asked for, and not kept.

    Raises:
        ValueError: two are of one boundary.
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
        return Experiences(self.stored[index]) if isinstance(index, slice) else self.stored[index].opened()

    def __iter__(self) -> Iterator[Experience]:
        return (one.opened() for one in self.stored)

    def of_runs(self, runs: Iterable[str]) -> "Experiences":
        """Those of some runs."""
        wanted = set(runs)
        return Experiences(e for e in self.stored if e.run_id in wanted)

    @property
    def runs(self) -> tuple[str, ...]:
        """The runs that they are of, in order."""
        return tuple(dict.fromkeys(e.run_id for e in self.stored))

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the canonical lines in order, each ended by a newline."""
        found = hashlib.sha256()
        for one in self.stored:
            found.update(one.canonical() + b"\n")
        return found.hexdigest()
