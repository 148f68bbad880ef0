"""control.kasmina.commands: commands to a trainer. A trainer applies each command at most once, by its id."""

from typing import Literal
from uuid import UUID

from esper.schemas.base import BlueprintId, Boundary, Count, LayerId, Positive, SeedId, Sha256, Version
from esper.schemas.enums import SeedStage
from esper.schemas.events.base import RunEvent


class SeedCommand(RunEvent):
    """A command for one seed.

    It is valid for one incarnation, for a seed at ``expected_stage``, up to and including the step
    ``expires_at_step``; the trainer answers any other command with ``CommandRejected``. The record's id is the
    command's id.
    """

    boundary: Boundary
    decision_id: UUID
    layer_id: LayerId
    seed_id: SeedId
    expected_stage: SeedStage
    expires_at_step: Count


class GerminateSeed(SeedCommand):
    """Load the kernel into a dormant seed."""

    type: Literal["esper.seed.germinate.v1"] = "esper.seed.germinate.v1"
    expected_stage: Literal[SeedStage.DORMANT] = SeedStage.DORMANT
    blueprint_id: BlueprintId
    blueprint_version: Version
    kernel_sha256: Sha256
    kernel_size_bytes: Positive


class CullSeed(SeedCommand):
    """Give a seed up: it becomes cancelled before grafting, culled from then on."""

    type: Literal["esper.seed.cull.v1"] = "esper.seed.cull.v1"


class FossilizeSeed(SeedCommand):
    """Make a seed permanent."""

    type: Literal["esper.seed.fossilize.v1"] = "esper.seed.fossilize.v1"
    expected_stage: Literal[SeedStage.EVALUATING] = SeedStage.EVALUATING
