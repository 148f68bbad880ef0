"""Parameters that several routes take."""

from typing import Annotated, TypeVar

from fastapi import Path, Query

from esper.schemas.base import BlueprintId, RunId, Sha256
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.pagination import PageQuery

Model = TypeVar("Model", bound=ApiModel)

QueryOf = Annotated[Model, Query()]
RunPath = Annotated[RunId, Path(description="The run's id.", examples=["digits-demo"])]
BlueprintPath = Annotated[BlueprintId, Path(description="The blueprint's id.", examples=["low-rank-4"])]
KernelPath = Annotated[Sha256, Path(description="The SHA-256 of the kernel's bytes.")]


class UnfilteredQuery(PageQuery):
    """The query of a list without filters."""


class EmptyQuery(ApiModel):
    """The query of a route without parameters."""


NoParameters = Annotated[EmptyQuery, Query()]
