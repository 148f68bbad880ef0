"""The states of seeds at a boundary: their transitions on the run's lineage, applied in order.

An incarnation starts from the seeds of its checkpoint and applies its own transitions. Transitions of older
incarnations, before they were superseded, add the history that a checkpoint does not have: when a seed germinated, how
often, and how often it was given up.
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
    """The state of one seed, changed in place by each transition."""

    stage: SeedStage = SeedStage.DORMANT
    since_step: int = 0
    blueprint_id: str | None = None
    num_parameters: int = 0
    germinated_at_step: int | None = None
    num_germinations: int = 0
    num_given_up: int = 0

    def apply(self, row: Row) -> None:
        """Apply one transition."""
        self.stage, self.since_step = SeedStage(row["to_stage"]), row["step"]
        self.blueprint_id, self.num_parameters = row["blueprint_id"], row["num_parameters"]
        if self.stage is SeedStage.GERMINATED:
            self.germinated_at_step = row["step"]
            self.num_germinations += 1
        self.num_given_up += self.stage in EMBARGO_STAGES

    def restore(self, saved: Row | None, from_step: int) -> None:
        """Set the state of the checkpoint, keeping the history; None if the seed was dormant there."""
        if saved is None:
            if self.stage is not SeedStage.DORMANT:
                self.stage, self.since_step = SeedStage.DORMANT, from_step
                self.blueprint_id, self.num_parameters = None, 0
            return
        if self.blueprint_id != saved["blueprint_id"]:
            self.blueprint_id, self.num_parameters = saved["blueprint_id"], 0
        self.stage, self.since_step = SeedStage(saved["stage"]), saved["stage_since_step"]


def seed_states(
    incarnation: int, from_step: int, ends: Mapping[int, int], transitions: Sequence[Row], saved: Sequence[Row]
) -> Mapping[SeedKey, SeedState]:
    """The states of the seeds that had a transition, or were not dormant at the checkpoint.

    Args:
        incarnation: the one that reached the boundary.
        from_step: the step at which it started or resumed.
        ends: incarnation of the lineage -> the last sequence of its transitions that counts.
        transitions: in any order; those of other incarnations, or beyond that sequence, are left out.
        saved: the checkpoint's seeds.
    """
    states: dict[SeedKey, SeedState] = {}
    counted = [row for row in transitions if row["seen_from"] <= ends.get(row["incarnation"], -1)]
    counted.sort(key=lambda row: (row["incarnation"], row["sequence"]))
    own = [row for row in counted if row["incarnation"] == incarnation]
    for row in counted[: len(counted) - len(own)]:
        states.setdefault((row["layer_id"], row["seed_id"]), SeedState()).apply(row)
    awake = {(row["layer_id"], row["seed_id"]): row for row in saved}
    for key in awake.keys() | states.keys():
        states.setdefault(key, SeedState()).restore(awake.get(key), from_step)
    for row in own:
        states.setdefault((row["layer_id"], row["seed_id"]), SeedState()).apply(row)
    return states
