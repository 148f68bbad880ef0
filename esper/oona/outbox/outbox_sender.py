"""Sends what waits in an outbox, in its order; what no broker takes is set aside, so that it holds nothing up."""

from esper.errors import NotAllowedError, UnavailableError
from esper.logging import get_logger
from esper.oona.outbox.outbox_store import Outbox
from esper.oona.producer import OonaProducer

BATCH = 500

AWAY = (UnavailableError, NotAllowedError)
"""What time can mend: a broker comes back, a right is given back. Events wait for it."""

_log = get_logger(__name__)


async def send_oldest(outbox: Outbox, producer: OonaProducer) -> int:
    """Send a batch; gives how many records are dealt with, 0 where nothing waits.

    Raises:
        UnavailableError, NotAllowedError: Kafka did not take all of it; the rest waits, in its order.
        OutboxFullError: there is no room to set a refused record aside; the same.
    """
    waiting = outbox.oldest(BATCH)
    if not waiting:
        return 0
    deliveries = await producer.deliver([record for _id, record in waiting])
    pairs = list(zip(waiting, deliveries, strict=True))
    away = [d.error for d in deliveries if isinstance(d.error, AWAY)]
    if away:
        outbox.remove([record_id for (record_id, _record), d in pairs if d.position is not None])
        raise away[0]
    for (record_id, record), delivery in pairs:
        if delivery.error is not None:
            outbox.set_aside(record_id, str(delivery.error))
            _log.error("outbox.record_refused", topic=record.topic, error=str(delivery.error))
    outbox.remove_up_to(waiting[-1][0])
    return len(waiting)
