"""Cost of contracts against msgspec and plain pydantic: one health signal, and a report of 64 signals.

"plain pydantic" has the same fields without validation rules, "msgspec" the same fields as Structs. All three read and
write the same bytes in turns, so that noise of the machine affects all of them.
"""

import random
import statistics
import struct
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from esper.oona.cloudevents import decode, encode
from esper.schemas.events import LayerHealthMeasured
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal

ROUNDS, NUM_SIGNALS = 60, 64


class PlainSignal(BaseModel):
    layer_id: str
    seed_id: int
    chunk_id: int
    epoch: int
    health_score: float
    activation_mean: float | None = None
    activation_std: float | None = None
    dead_ratio: float | None = None
    gradient_norm: float | None = None
    effective_rank: float | None = None
    non_finite: bool = False


class PlainReport(BaseModel):
    type: str
    run_id: str
    incarnation: int
    sequence: int
    step: int
    epoch: int
    layer_id: str
    signals: tuple[PlainSignal, ...]


class StructSignal(msgspec.Struct):
    layer_id: str
    seed_id: int
    chunk_id: int
    epoch: int
    health_score: float
    activation_mean: float | None = None
    activation_std: float | None = None
    dead_ratio: float | None = None
    gradient_norm: float | None = None
    effective_rank: float | None = None
    non_finite: bool = False


class StructReport(msgspec.Struct):
    type: str
    run_id: str
    incarnation: int
    sequence: int
    step: int
    epoch: int
    layer_id: str
    signals: tuple[StructSignal, ...]


def report() -> LayerHealthMeasured:
    """A report of 64 signals with statistics as torch returns them: float32 widened to 17 digits."""
    rng = random.Random(0)

    def single() -> float:
        return float(struct.unpack("f", struct.pack("f", rng.random()))[0])

    signals = tuple(
        HealthSignal(
            layer_id="layer1.0.conv1", seed_id=n, chunk_id=n, epoch=3, health_score=single(), activation_mean=single(),
            activation_std=single(), dead_ratio=single(), gradient_norm=single() / 1000,
            effective_rank=8 * single(),
        )
        for n in range(NUM_SIGNALS)
    )  # fmt: skip
    return LayerHealthMeasured(
        run_id="bench", incarnation=1, sequence=4, step=40, epoch=3, layer_id="layer1.0.conv1", signals=signals
    )


def measure(ways: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    """Microseconds per call, all variants in turns, ``ROUNDS`` times."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _round in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            for _n in range(calls):
                way()
            taken[name].append((time.perf_counter() - began) / calls * 1e6)
    return taken


def compare(event: Any, plain_type: Any, struct_type: Any, calls: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds per call by direction and variant."""
    value = event.model_dump_json().encode()
    plain, packed = plain_type.model_validate_json(value), msgspec.json.decode(value, type=struct_type)
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder(struct_type)
    return {
        "encode": measure(
            {
                "esper": event.model_dump_json,
                "plain": plain.model_dump_json,
                "msgspec": lambda: encoder.encode(packed),
            },
            calls,
        ),
        "decode": measure(
            {
                "esper": lambda: type(event).model_validate_json(value, strict=True),
                "plain": lambda: plain_type.model_validate_json(value),
                "msgspec": lambda: decoder.decode(value),
            },
            calls,
        ),
    }


def main() -> None:
    table = Table("microseconds per call, median (best)", "esper", "plain pydantic", "msgspec", "esper / plain", "aim")
    whole = report()
    for payload, event, plain, packed, calls, aim in (
        ("one HealthSignal", whole.signals[0], PlainSignal, StructSignal, 400, "10 us both directions"),
        ("report of 64 signals", whole, PlainReport, StructReport, 20, "100 us each direction"),
    ):
        for direction, taken in compare(event, plain, packed, calls).items():
            cells = [f"{statistics.median(t):.1f} ({min(t):.1f})" for t in taken.values()]
            ratio = statistics.median(taken["esper"]) / statistics.median(taken["plain"])
            table.add_row(f"{payload}, {direction}", *cells, f"{ratio:.2f}", aim)
    sent = OonaMessage.of(whole, id=uuid.uuid4(), source="bench")
    record = encode(sent)
    for direction, way in {
        "encode": lambda: encode(sent),
        "decode": lambda: decode(record.topic, record.value, record.headers),
    }.items():
        taken = measure({"esper": way}, 20)["esper"]
        table.add_row(
            f"report in its envelope, {direction}", f"{statistics.median(taken):.1f} ({min(taken):.1f})", "", "", "", ""
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
