"""Germinate commands as Tamiyo sends them, and the kernels that they name, for tests of the run link."""

from typing import Any

from esper.embedded.stack import EmbeddedStack
from esper.kasmina.kernels import build_kernel
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind
from esper.schemas.messages import OonaMessage
from esper.storage.blobs import BlobStore

SPEC = BlueprintSpec(module="low_rank", parameters={"rank": 2}, targets=(LayerKind.LINEAR,))


async def store_kernel(stack: EmbeddedStack, width: int) -> tuple[str, int]:
    """Store a kernel of ``SPEC`` for layers of this width; returns its SHA-256 and its size in bytes."""
    return await store_blob(stack, build_kernel("low-rank-2", SPEC, LayerKind.LINEAR, width))


async def store_blob(stack: EmbeddedStack, data: bytes) -> tuple[str, int]:
    """Store any bytes in S3; returns their SHA-256 and their size in bytes."""
    async with BlobStore(stack.settings().need_s3()) as blobs:
        return await blobs.put(data), len(data)


async def send_germinate(stack: EmbeddedStack, run_id: str, kernel: tuple[str, int], **changed: Any) -> OonaMessage:
    """Send a command to germinate seed 0 of layer "0"; ``kernel`` is (SHA-256, bytes), ``changed`` overrides fields."""
    boundary = changed.pop("boundary", 1)
    decision = ids.decision_id(run_id, 1, boundary)
    fields = {
        "run_id": run_id, "incarnation": 1, "boundary": boundary, "decision_id": decision, "layer_id": "0", "seed_id": 0,
        "expires_at_step": 10_000, "blueprint_id": "low-rank-2", "blueprint_version": 3, "kernel_sha256": kernel[0],
        "kernel_size_bytes": kernel[1],
    }  # fmt: skip
    event = events.GerminateSeed.model_validate({**fields, **changed})
    message = OonaMessage.of(event, id=ids.command_id(decision), source="test", causation_id=decision)
    async with OonaProducer(stack.settings().need_kafka()) as producer:
        await producer.send(message)
    return message
