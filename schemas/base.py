"""The base classes and field types of all contracts."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SLUG_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
TEXT_PATTERN = r"^[^\x00]*$"
"""Any text without NUL: Postgres stores NUL in no text column, so a record with one could never be projected."""

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
"""The largest values of the integer columns of the projections."""

Text = Annotated[str, StringConstraints(pattern=TEXT_PATTERN)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=TEXT_PATTERN)]
ShortName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=TEXT_PATTERN)]
Remark = Annotated[str, StringConstraints(max_length=2000, pattern=TEXT_PATTERN)]
LayerId = Name
RunId = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
BlueprintId = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
PolicyId = Annotated[str, StringConstraints(pattern=SLUG_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SeedId = Annotated[int, Field(ge=0, le=1023)]
Count = Annotated[int, Field(ge=0, le=MAX_INT64)]
Positive = Annotated[int, Field(ge=1, le=MAX_INT64)]
Sequence = Count
Epoch = Annotated[int, Field(ge=0, le=MAX_INT32)]
Incarnation = Annotated[int, Field(ge=1, le=MAX_INT32)]
Boundary = Annotated[int, Field(ge=1, le=MAX_INT32)]
Version = Annotated[int, Field(ge=1, le=MAX_INT32)]
NumFeatures = Annotated[int, Field(ge=1, le=MAX_INT32)]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Scalar = bool | int | float | Text


class Contract(BaseModel):
    """A mutable contract: validates every assignment and refuses unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        ser_json_inf_nan="null",
        allow_inf_nan=False,
    )


class FrozenContract(Contract):
    """An immutable contract: events, commands and their parts."""

    model_config = ConfigDict(frozen=True)
