"""The route of a kernel's bytes: what S3 does not have, or has altered, is a 502, never other bytes."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from esper.errors import AlteredBlobError, ContractError, MissingBlobError
from esper.services.urza.api.parameters import EmptyQuery
from esper.services.urza.api.routes.kernels import get_kernel

KERNEL = "a" * 64


@pytest.mark.parametrize("error", [MissingBlobError("it is missing"), AlteredBlobError("it was altered")])
def test_lost_kernel_is_a_bad_gateway(error: ContractError) -> None:
    async def one(_name: str, **_parameters: Any) -> dict[str, str]:
        return {"kernel_sha256": KERNEL}

    async def get(_digest: str, **_options: Any) -> bytes:
        raise error

    urza = SimpleNamespace(blobs=SimpleNamespace(get=get))
    context = SimpleNamespace(reader=SimpleNamespace(one=one), urza=urza)
    request: Any = SimpleNamespace(state=SimpleNamespace(context=context))
    response = asyncio.run(get_kernel(request, KERNEL, EmptyQuery()))
    body = json.loads(bytes(response.body))
    assert (response.status_code, response.media_type) == (502, "application/problem+json")
    assert body["detail"] == f"the object store does not have the kernel that the log names: {error}"
