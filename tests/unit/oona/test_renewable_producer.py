"""A lane's producer is renewed for many senders at once."""

import asyncio

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.renewable_producer import RenewableProducer


class LaneWithoutBroker(RenewableProducer):
    """One whose broker is away."""

    async def open(self) -> None:
        await asyncio.sleep(0)
        raise UnavailableError("the broker is away")


async def test_every_sender_hears_that_the_broker_is_away_and_nothing_else() -> None:
    """Whose renewal failed may find that another sender has begun the next one already."""
    lane = LaneWithoutBroker(KafkaSettings(bootstrap_servers="127.0.0.1:1"), "test")

    async def ask() -> list[Exception]:
        heard: list[Exception] = []
        for _ in range(5):
            try:
                await lane._renewed(None)
            except Exception as error:
                heard.append(error)
        return heard

    heard = [e for some in await asyncio.gather(*[ask() for _ in range(8)]) for e in some]
    assert len(heard) == 40
    assert {type(e) for e in heard} == {UnavailableError}
