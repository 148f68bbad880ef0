"""control.kasmina.commands: what a trainer is asked to do. Imperative, applied once, by id."""

from typing import Literal
from uuid import UUID

from esper.schemas.base import BlueprintId, Boundary, Count, LayerId, Positive, SeedId, Sha256, Version
from esper.schemas.enums import SeedStage
from esper.schemas.events.base import RunEvent


class SeedCommand(RunEvent):
    """A command for one seed.

    It holds for one incarnation, for a seed at ``expected_stage``, up to and with the step
    ``expires_at_step``; what does not match is rejected by an event. The record's id is
    the command's id.
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
    """Give a seed up: cancelled before it was grafted, culled after."""

    type: Literal["esper.seed.cull.v1"] = "esper.seed.cull.v1"


class FossilizeSeed(SeedCommand):
    """Make a seed permanent."""

    type: Literal["esper.seed.fossilize.v1"] = "esper.seed.fossilize.v1"
    expected_stage: Literal[SeedStage.EVALUATING] = SeedStage.EVALUATING
