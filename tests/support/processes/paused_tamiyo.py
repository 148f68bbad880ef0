"""A Tamiyo that is paused before it writes. Usage: ``paused_tamiyo.py RUN TOPIC``; the environment has its settings.

It stops itself (SIGSTOP) before it sends the first record of that run to that topic, as the kernel or a paused host
would; the test kills or continues it. It prints a line after each poll of the projections.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from esper.config import load_settings
from esper.oona.records import Record
from esper.services.tamiyo.decision_service import DecisionService
from esper.services.tamiyo.settings import TamiyoSettings

POLL_FINISHED = "poll finished"


def stop_before(service: Any, run_id: str, topic: str) -> None:
    """Make the process stop itself before its first record of that run on that topic."""
    deliver, is_armed = service._producer.deliver, True

    async def stopping(records: Sequence[Record], **options: Any) -> Any:
        nonlocal is_armed
        if is_armed and any((r.topic, r.key) == (topic, run_id.encode()) for r in records):
            is_armed = False
            os.kill(os.getpid(), signal.SIGSTOP)
        return await deliver(records, **options)

    service._producer.deliver = stopping


async def main(run_id: str, topic: str) -> None:
    settings = load_settings()
    async with DecisionService(settings, settings.section("tamiyo", TamiyoSettings)) as service:
        tick = service.tick

        async def tick_and_report() -> None:
            await tick()
            print(POLL_FINISHED, flush=True)

        service.tick = tick_and_report  # type: ignore[method-assign]
        stop_before(service, run_id, topic)
        await service.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
