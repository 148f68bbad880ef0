"""Builds the kernels that runs could want: registered by an event once S3 has their bytes."""

import json
from typing import Any

from esper.errors import KernelError
from esper.kasmina.kernels import MAX_KERNEL_BYTES, build_kernel, load_kernel
from esper.logging import get_logger
from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec, Kernel
from esper.schemas.enums import LayerKind
from esper.schemas.events import KernelRegistered
from esper.schemas.messages import OonaMessage
from esper.services.urza.catalogue import SOURCE
from esper.storage.blobs import BlobStore
from esper.streams.queries import queries

_log = get_logger(__name__)


class Compiler:
    """Builds each wanted kernel once; what cannot be built is logged once and left."""

    def __init__(self, producer: Any, blobs: BlobStore, kernel_seed: int) -> None:
        self._producer = producer
        self._blobs = blobs
        self._kernel_seed = kernel_seed
        self._done: set[tuple[str, str, int]] = set()

    async def compile_wanted(self, connection: Any) -> int:
        """Build, store, read back and register what is wanted; gives the number of kernels."""
        rows = [r async for r in queries("urza").wanted_kernels(connection)]
        count = 0
        for row in rows:
            key = (row["blueprint_id"], row["kind"], row["num_features"])
            if key not in self._done:
                count += await self._compile(row)
                self._done.add(key)
        return count

    async def _compile(self, row: Any) -> bool:
        spec = BlueprintSpec.model_validate(json.loads(row["spec"]))
        kind, width = LayerKind(row["kind"]), row["num_features"]
        try:
            data = build_kernel(row["blueprint_id"], spec, kind, width, seed=self._kernel_seed)
            digest = await self._blobs.put(data)
            kernel = load_kernel(await self._blobs.get(digest, max_bytes=MAX_KERNEL_BYTES), digest)
        except KernelError as error:
            _log.warning("kernel.refused", blueprint=row["blueprint_id"], kind=kind, width=width, error=str(error))
            return False
        registered = Kernel(
            kernel_sha256=digest,
            blueprint_id=row["blueprint_id"],
            blueprint_version=row["version"],
            target=kind,
            num_features=width,
            num_parameters=kernel.num_parameters,
            size_bytes=len(data),
        )
        event = KernelRegistered(blueprint_id=row["blueprint_id"], kernel=registered)
        await self._producer.send(OonaMessage.of(event, id=ids.kernel_event_id(digest), source=SOURCE))
        _log.info("kernel.registered", blueprint=row["blueprint_id"], kind=kind, width=width, sha256=digest[:12])
        return True
