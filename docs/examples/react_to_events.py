"""Reacts to Esper's events: prints each seed that has become a permanent part of its network, and each field report.

``python react_to_events.py [GROUP]``, while the stack runs. Ctrl-C ends it. Processes with one GROUP share the work.
"""

import asyncio
import signal
import sys

from esper.config import load_settings
from esper.oona import EventBatch, GroupConsumer
from esper.schemas.enums import SeedStage
from esper.schemas.events import FieldReported, SeedTransitioned
from esper.schemas.topics import FIELD_REPORTS, LIFECYCLE


async def print_growth(batch: EventBatch) -> None:
    """Handle one batch of one partition. If it raises, the same batch comes again."""
    for message, _position in batch.events:
        event = message.data
        if isinstance(event, SeedTransitioned) and event.to_stage is SeedStage.FOSSILIZED:
            print(f"{event.run_id}: {event.blueprint_id} in {event.layer_id} is permanent from step {event.step}")
        elif isinstance(event, FieldReported):
            print(f"{event.run_id}: {event.metric} {event.before} -> {event.after}")


async def main() -> None:
    group = sys.argv[1] if len(sys.argv) > 1 else "growth-printer"
    kafka = load_settings().need_kafka()  # from the running stack, or ESPER_KAFKA__BOOTSTRAP_SERVERS
    async with GroupConsumer(kafka, group, [LIFECYCLE, FIELD_REPORTS], print_growth) as consumer:
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal_number, consumer.stop)
        print("reading")
        await consumer.run()  # until consumer.stop()


if __name__ == "__main__":
    asyncio.run(main())
