"""/kernels: weights by the SHA-256 of their bytes."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from esper.errors import ContractError
from esper.kasmina.catalogue import MAX_KERNEL_BYTES
from esper.logging import get_logger
from esper.schemas.base import BlueprintId, NumFeatures
from esper.schemas.enums import LayerKind
from esper.schemas.topics import BLUEPRINTS
from esper.services.urza.api.api_context import api_context
from esper.services.urza.api.models import ApiModel
from esper.services.urza.api.pagination import INT4, TEXT, Listing, Page, PageQuery
from esper.services.urza.api.parameters import KernelPath, NoParameters, QueryOf
from esper.services.urza.api.problems import not_found, problem
from esper.services.urza.api.response_cache import immutable_response

router = APIRouter(prefix="/kernels", tags=["kernels"])

_log = get_logger(__name__)

_WITHIN_BLUEPRINT = [
    ("after_target", "target", TEXT),
    ("after_features", "num_features", INT4),
    ("after_sha256", "kernel_sha256", TEXT),
]
ALL = Listing("kernels", [("after_blueprint", "blueprint_id", TEXT), *_WITHIN_BLUEPRINT])
OF_BLUEPRINT = Listing("kernels_of_blueprint", _WITHIN_BLUEPRINT)


class KernelResponse(ApiModel):
    """A registered kernel; its bytes are at /kernels/{kernel_sha256}."""

    kernel_sha256: str
    blueprint_id: str
    blueprint_version: int
    target: LayerKind
    num_features: int
    num_parameters: int
    size_bytes: int
    at: datetime


class KernelQuery(PageQuery):
    """Filters of kernels."""

    blueprint_id: BlueprintId | None = Field(None, description="Of this blueprint.")
    target: LayerKind | None = Field(None, description="For layers of this kind.")
    num_features: Annotated[NumFeatures | None, Field(description="Of this width.")] = None


@router.get("", response_model=Page[KernelResponse])
async def list_kernels(request: Request, query: QueryOf[KernelQuery]) -> Response:
    """Kernels, by blueprint, target and width."""
    filters = {"target": query.target, "num_features": query.num_features}
    if query.blueprint_id is None:
        return await ALL.page(request, query, [BLUEPRINTS.name], **filters)
    return await OF_BLUEPRINT.page(request, query, [BLUEPRINTS.name], blueprint_id=query.blueprint_id, **filters)


@router.get(
    "/{kernel_sha256}",
    response_class=Response,
    responses={
        200: {
            "description": "The kernel: safetensors",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def get_kernel(request: Request, kernel_sha256: KernelPath, _: NoParameters) -> Response:
    """The verified bytes of a kernel. They never change, so a client may cache them forever."""
    context = api_context(request)
    if await context.reader.one("kernel", kernel_sha256=kernel_sha256) is None:
        raise not_found("kernel", kernel_sha256)
    try:
        data = await context.urza.blobs.get(kernel_sha256, max_bytes=MAX_KERNEL_BYTES)
    except ContractError as error:  # S3 lacks the blob, or has other bytes
        _log.error("kernel.check_failed", kernel=kernel_sha256, error=str(error))
        return problem(502, f"the object store does not have the kernel that the log names: {error}")
    return immutable_response(request, data, kernel_sha256)
