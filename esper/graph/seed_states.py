"""Seeds at a boundary: their transitions on the live line, folded in order.

The incarnation's own transitions start from what its checkpoint held. What older incarnations tell
(before they were superseded) adds the history that a checkpoint does not have: when a seed
germinated, how often, how often it was given up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esper.graph.view_rows import Row
from esper.schemas.enums import SeedStage
from esper.schemas.lifecycle import EMBARGO_STAGES

SeedKey = tuple[str, int]
"""(layer id, seed id)."""


@dataclass(slots=True)
class SeedState:
    """One seed while the fold is under way."""

    stage: SeedStage = SeedStage.DORMANT
    since_step: int = 0
    blueprint_id: str | None = None
    num_parameters: int = 0
    germinated_at_step: int | None = None
    num_germinations: int = 0
    num_given_up: int = 0

    def move(self, row: Row) -> None:
        """One transition, as it was told."""
        self.stage, self.since_step = SeedStage(row["to_stage"]), row["step"]
        self.blueprint_id, self.num_parameters = row["blueprint_id"], row["num_parameters"]
        if self.stage is SeedStage.GERMINATED:
            self.germinated_at_step = row["step"]
            self.num_germinations += 1
        self.num_given_up += self.stage in EMBARGO_STAGES

    def resume(self, held: Row | None, from_step: int) -> None:
        """What the checkpoint held of it is what counts; None where it was dormant there."""
        if held is None:
            if self.stage is not SeedStage.DORMANT:
                self.stage, self.since_step, self.blueprint_id, self.num_parameters = (
                    SeedStage.DORMANT,
                    from_step,
                    None,
                    0,
                )
            return
        if self.blueprint_id != held["blueprint_id"]:
            self.blueprint_id, self.num_parameters = held["blueprint_id"], 0
        self.stage, self.since_step = SeedStage(held["stage"]), held["stage_since_step"]


def seed_states(
    incarnation: int, from_step: int, line: Mapping[int, int], moves: Sequence[Row], held: Sequence[Row]
) -> Mapping[SeedKey, SeedState]:
    """The seeds that ever moved, or were awake at the checkpoint.

    Args:
        line: incarnation -> the last sequence of its transitions that counts.
        moves: transitions; of other incarnations, or beyond that sequence, they are left out.
        held: the checkpoint's seeds.
    """
    states: dict[SeedKey, SeedState] = {}
    counted = [m for m in moves if m["seen_from"] <= line.get(m["incarnation"], -1)]
    counted.sort(key=lambda m: (m["incarnation"], m["sequence"]))
    own = [m for m in counted if m["incarnation"] == incarnation]
    for row in counted[: len(counted) - len(own)]:
        states.setdefault((row["layer_id"], row["seed_id"]), SeedState()).move(row)
    awake = {(row["layer_id"], row["seed_id"]): row for row in held}
    for key in awake.keys() | states.keys():
        states.setdefault(key, SeedState()).resume(awake.get(key), from_step)
    for row in own:
        states.setdefault((row["layer_id"], row["seed_id"]), SeedState()).move(row)
    return states
