"""Commands as Tamiyo would send them, and what a run told, for tests of the trainer's link."""

from typing import Any

from esper.embedded.stack import EmbeddedStack
from esper.kasmina.kernels import build_kernel
from esper.oona.log_reader import partition_of, read_range
from esper.oona.producer import OonaProducer
from esper.schemas import events, ids, topics
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind
from esper.schemas.messages import OonaMessage
from esper.storage.blobs import BlobStore

SPEC = BlueprintSpec(module="low_rank", parameters={"rank": 2}, targets=(LayerKind.LINEAR,))


async def stored_kernel(stack: EmbeddedStack, width: int) -> tuple[str, int]:
    return await stored(stack, build_kernel("low-rank-2", SPEC, LayerKind.LINEAR, width))


async def stored(stack: EmbeddedStack, data: bytes) -> tuple[str, int]:
    async with BlobStore(stack.settings().need_s3()) as blobs:
        return await blobs.put(data), len(data)


async def germinate(stack: EmbeddedStack, run_id: str, kernel: tuple[str, int], **changed: Any) -> OonaMessage:
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


async def told(stack: EmbeddedStack, run_id: str, *names: topics.TopicSpec) -> list[OonaMessage]:
    found = []
    for topic in names or (topics.RUNS, topics.LIFECYCLE, topics.FIELD_REPORTS, topics.TELEMETRY):
        partition = partition_of(run_id, topic)
        async for record in read_range(stack.settings().need_kafka(), topic, partition=partition):
            if record.key == run_id.encode():
                found.append(record.decode())
    return found
