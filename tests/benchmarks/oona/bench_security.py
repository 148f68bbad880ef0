"""Cost of security: preflight check, start of a producer, and events per second, in plain text and with SASL and TLS.

Run: python tests/benchmarks/oona/bench_security.py
"""

import asyncio
import logging
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/support/processes/secure_kafka.py

from support.processes.secure_kafka import secure_kafka

from esper.config import KafkaSettings
from esper.embedded.kafka import EmbeddedKafka
from esper.oona.admin.topics import apply_topics
from esper.oona.client_options import preflight_check
from esper.oona.producer import OonaProducer
from esper.schemas.events import RunEnded
from esper.schemas.messages import OonaMessage

logging.getLogger("aiokafka").setLevel(logging.ERROR)  # new topics have no leader yet

KNOCKS, STARTS, EVENTS = 20, 5, 20_000


async def seconds(times: int, work: Callable[[], Awaitable[object]]) -> float:
    """Mean duration of several calls."""
    before = time.perf_counter()
    for _n in range(times):
        await work()
    return (time.perf_counter() - before) / times


async def figures(kafka: KafkaSettings) -> tuple[float, float, float]:
    """Seconds of a preflight check and of a producer's start and stop; events per second."""
    await apply_topics(kafka)

    async def start() -> None:
        async with OonaProducer(kafka):
            pass

    ended = [
        RunEnded(run_id=f"r{n % 64}", incarnation=1, sequence=n, step=0, status="completed") for n in range(EVENTS)
    ]
    messages = [OonaMessage.of(e, id=uuid.uuid4(), source="bench") for e in ended]
    knocking, starting = await seconds(KNOCKS, lambda: preflight_check(kafka)), await seconds(STARTS, start)
    async with OonaProducer(kafka) as producer:
        await producer.send_batch(messages[:1_000])
        before = time.perf_counter()
        await producer.send_batch(messages)
        return knocking, starting, EVENTS / (time.perf_counter() - before)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        plain = EmbeddedKafka(Path(folder) / "plain")
        plain.start()
        try:
            clear = asyncio.run(figures(KafkaSettings(bootstrap_servers=plain.bootstrap_servers)))
        finally:
            plain.stop()
        with secure_kafka(Path(folder) / "secure", super_users=("bench",)) as kafka:
            kafka.add_users("bench")
            secured = asyncio.run(figures(kafka.settings("bench")))
    print(f"{'':24}{'plain text':>14}{'SCRAM and TLS':>16}")
    print(f"{'knock':24}{clear[0] * 1e3:>11.1f} ms{secured[0] * 1e3:>13.1f} ms")
    print(f"{'producer start and stop':24}{clear[1] * 1e3:>11.1f} ms{secured[1] * 1e3:>13.1f} ms")
    print(f"{'events a second':24}{clear[2]:>14,.0f}{secured[2]:>16,.0f}")


if __name__ == "__main__":
    main()
