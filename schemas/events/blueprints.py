"""innovation.blueprints: how blueprints and kernels come and go. Keyed by the blueprint."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from esper.schemas.assets import BlueprintSpec, Kernel
from esper.schemas.base import MAX_INT32, BlueprintId, Remark
from esper.schemas.conditions import GIVEN, NULL, when
from esper.schemas.enums import BlueprintChange
from esper.schemas.events.base import Event


class BlueprintChangeRequested(Event):
    """Asks for a change; ``schemas.verdicts`` says what becomes of it, for every reader.

    ``expected_version`` is the version that the writer saw, 0 where the blueprint is new.
    """

    model_config = ConfigDict(
        json_schema_extra=when("change", "propose", then={"spec": GIVEN}, otherwise={"spec": NULL})
    )

    type: Literal["esper.blueprint-change.requested.v2"] = "esper.blueprint-change.requested.v2"
    blueprint_id: BlueprintId
    change: BlueprintChange
    expected_version: Annotated[int, Field(ge=0, lt=MAX_INT32)]
    spec: BlueprintSpec | None = None
    reason: Remark = ""

    @model_validator(mode="after")
    def _a_proposal_has_a_spec(self) -> Self:
        if (self.change is BlueprintChange.PROPOSE) != (self.spec is not None):
            raise ValueError("spec goes with propose alone")
        return self


class KernelRegistered(Event):
    """The kernel's bytes are in S3 under their SHA-256, and were read back."""

    type: Literal["esper.kernel.registered.v2"] = "esper.kernel.registered.v2"
    blueprint_id: BlueprintId
    kernel: Kernel

    @model_validator(mode="after")
    def _key_is_the_kernels(self) -> Self:
        if self.kernel.blueprint_id != self.blueprint_id:
            raise ValueError(f"blueprint_id must be the kernel's, {self.kernel.blueprint_id}")
        return self
