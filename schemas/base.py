"""What every contract shares: unknown fields are refused, assignments are validated."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SLUG_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

RunId = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
BlueprintId = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
PolicyId = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
LayerId = Annotated[str, StringConstraints(min_length=1, max_length=255)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SeedId = Annotated[int, Field(ge=0, le=1023)]
Incarnation = Annotated[int, Field(ge=1)]
Sequence = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Scalar = bool | int | float | str


class Contract(BaseModel):
    """A mutable contract. Every assignment is validated; unknown fields are refused."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        ser_json_inf_nan="null",
        allow_inf_nan=False,
    )


class Fact(Contract):
    """A contract that never changes once made: events, commands, parts of them."""

    model_config = ConfigDict(frozen=True)
