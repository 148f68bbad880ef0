"""Parameters that many routes take."""

from typing import Annotated, TypeVar

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict

from esper.schemas.base import RunId, Sha256
from esper.services.urza.api.pagination import PageQuery

Model = TypeVar("Model", bound=BaseModel)

Queried = Annotated[Model, Query()]
RunPath = Annotated[RunId, Path(description="The run's id.", examples=["digits-demo"])]
KernelPath = Annotated[Sha256, Path(description="The SHA-256 of the kernel's bytes.")]


class Plain(PageQuery):
    """A list without filters."""


class Nothing(BaseModel):
    """A route without parameters: one that is given is an error, not ignored."""

    model_config = ConfigDict(extra="forbid")


PlainQuery = Annotated[Nothing, Query()]
