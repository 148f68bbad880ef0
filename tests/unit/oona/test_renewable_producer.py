"""RenewableProducer renews its producer for many senders at once."""

import asyncio

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.renewable_producer import RenewableProducer


class ProducerWithoutBroker(RenewableProducer):
    """A producer whose broker is away."""

    async def open(self) -> None:
        await asyncio.sleep(0)
        raise UnavailableError("the broker is away")


async def test_renewal_raises_the_same_error_to_every_sender() -> None:
    """A sender whose renewal failed may find that another one has started the next renewal."""
    producer = ProducerWithoutBroker(KafkaSettings(bootstrap_servers="127.0.0.1:1"), "test")

    async def renew() -> list[Exception]:
        errors: list[Exception] = []
        for _ in range(5):
            try:
                await producer._renewed(None)
            except Exception as error:
                errors.append(error)
        return errors

    errors = [e for some in await asyncio.gather(*[renew() for _ in range(8)]) for e in some]
    assert len(errors) == 40
    assert {type(e) for e in errors} == {UnavailableError}
