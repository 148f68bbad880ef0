"""innovation.blueprints: changes of blueprints, and the kernels built for them. Keyed by the blueprint."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from esper.schemas.assets import BlueprintSpec, Kernel, Measurement
from esper.schemas.base import MAX_INT32, BlueprintId, NumFeatures, Remark, ShortName, Version
from esper.schemas.enums import BlueprintChange, LayerKind
from esper.schemas.events.base import Event
from esper.schemas.specs.json_schema_conditions import NOT_NULL, NULL, when

SPEC_ONLY_WITH_PROPOSE = when("change", "propose", then={"spec": NOT_NULL}, otherwise={"spec": NULL})
"""The rule of ``check_spec`` in JSON Schema."""


def check_spec(change: BlueprintChange, spec: BlueprintSpec | None) -> None:
    """Check that a proposal has a spec and no other change has one.

    Raises:
        ValueError: a proposal has none, or another change has one.
    """
    if (change is BlueprintChange.PROPOSE) != (spec is not None):
        raise ValueError(f"spec: required for change propose, not allowed with another; got {change}")


class BlueprintChangeRequested(Event):
    """A requested change of a blueprint; ``schemas.change_verdicts`` computes its verdict, alike for every reader.

    ``expected_version`` is the version that the writer saw, 0 for a new blueprint.
    """

    model_config = ConfigDict(json_schema_extra=SPEC_ONLY_WITH_PROPOSE)

    type: Literal["esper.blueprint-change.requested.v2"] = "esper.blueprint-change.requested.v2"
    blueprint_id: BlueprintId
    change: BlueprintChange
    expected_version: Annotated[int, Field(ge=0, lt=MAX_INT32)]
    spec: BlueprintSpec | None = None
    reason: Remark = ""

    @model_validator(mode="after")
    def _check_spec(self) -> Self:
        check_spec(self.change, self.spec)
        return self


class KernelRegistered(Event):
    """A kernel is available: its bytes are in S3 under their SHA-256, and S3 verified their checksum on upload."""

    type: Literal["esper.kernel.registered.v2"] = "esper.kernel.registered.v2"
    blueprint_id: BlueprintId
    kernel: Kernel

    @model_validator(mode="after")
    def _check_blueprint(self) -> Self:
        if self.kernel.blueprint_id != self.blueprint_id:
            raise ValueError(f"blueprint_id must be the kernel's, {self.kernel.blueprint_id}; got {self.blueprint_id}")
        return self


class CertificateIssued(Event):
    """A blueprint was built and examined, and passed every check. It is the cause of the change ``certify``.

    ``blueprint_version`` is the version that was examined. Of two certificates of one version the first counts.
    """

    type: Literal["esper.certificate.issued.v1"] = "esper.certificate.issued.v1"
    blueprint_id: BlueprintId
    blueprint_version: Version
    examiner: Annotated[ShortName, Field(description="The environment of the examination: library, version, device.")]
    checks: Annotated[tuple[ShortName, ...], Field(min_length=1, description="The checks that passed.")]
    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1)]


class KernelRefused(Event):
    """A kernel for a blueprint version, layer kind and width cannot be built; Urza does not try it again."""

    type: Literal["esper.kernel.refused.v1"] = "esper.kernel.refused.v1"
    blueprint_id: BlueprintId
    blueprint_version: Version
    target: LayerKind
    num_features: NumFeatures
    reason: Remark
