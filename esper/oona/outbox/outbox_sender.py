"""Sends the records of an outbox, in order.

Invariant: a record that no broker accepts is moved to the table ``refused``, so that it blocks no other.
"""

from esper.logging import get_logger
from esper.oona.broker_errors import TRANSIENT_ERRORS
from esper.oona.outbox.outbox_store import Outbox
from esper.oona.producer import OonaProducer

BATCH_SIZE = 500

_log = get_logger(__name__)


async def send_oldest(outbox: Outbox, producer: OonaProducer) -> int:
    """Send one batch.

    Returns:
        The number of records sent or refused; 0 if none waits.

    Raises:
        UnavailableError, NotAllowedError: Kafka did not accept every record; the others wait, in order.
        OutboxFullError: the disk has no space for a refused record; the batch waits, in order.
    """
    waiting = outbox.oldest(BATCH_SIZE)
    if not waiting:
        return 0
    deliveries = await producer.deliver([record for _id, record in waiting])
    pairs = list(zip(waiting, deliveries, strict=True))
    transient = [d.error for d in deliveries if isinstance(d.error, TRANSIENT_ERRORS)]
    if transient:
        outbox.remove([record_id for (record_id, _record), d in pairs if d.position is not None])
        raise transient[0]
    for (record_id, record), delivery in pairs:
        if delivery.error is not None:
            outbox.copy_to_refused(record_id, str(delivery.error))
            _log.error("outbox.record_refused", topic=record.topic, error=str(delivery.error))
    outbox.remove_up_to(waiting[-1][0])
    return len(waiting)
