"""Changes of blueprints that people request, from the API or the command line: many in one call, one verdict each.

Owns the path of a request: an event whose id follows from an idempotency key, then the wait for the row that a worker
projects from it. Nothing else writes. Invariant: one change under one key has one id, hence one verdict, however
often it is sent; another change under that key is a conflict. A verdict belongs to an event id and a blueprint.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from esper.errors import ConflictError, ContractError
from esper.oona.cloudevents import encode
from esper.oona.producer import OonaProducer
from esper.schemas import ids
from esper.schemas.enums import BlueprintChange, Verdict
from esper.schemas.events import BlueprintChangeRequested
from esper.schemas.messages import OonaMessage
from esper.services.urza import library_queries
from esper.services.urza.projection_reader import ProjectionReader, Row

MAX_CHANGES = 500  # of one call
MAX_REMEMBERED = 10_000  # digests of requests that this process sent
POLL_S = 0.02
PROJECTED_FIELDS = ("change", "expected_version", "reason")
"""What a row keeps of a request; the specs of two requests are compared by the process that sent the first."""

Requests = Mapping[UUID, BlueprintChangeRequested]


@dataclass(frozen=True, slots=True)
class ChangeOutcome:
    """One requested change. ``row`` is its projected row with the verdict, None while it is not projected."""

    event_id: UUID
    request: BlueprintChangeRequested
    row: Row | None = None

    @property
    def verdict(self) -> Verdict | None:
        """The verdict; None while the change is not projected."""
        return None if self.row is None else Verdict(self.row["verdict"])

    @property
    def version_after(self) -> int | None:
        """The blueprint's version after an accepted change."""
        return None if self.row is None else self.row["version_after"]


def request_ids(key: str, num_changes: int) -> list[UUID]:
    """The event ids of the changes under an idempotency key, in the order of the request."""
    return [ids.request_id(f"{key}#{n}" if n else key) for n in range(num_changes)]


class BlueprintChanges:
    """Requests changes and reads their verdicts."""

    def __init__(self, reader: ProjectionReader, producer: OonaProducer) -> None:
        self._reader = reader
        self._producer = producer
        self._sent: dict[UUID, str] = {}

    async def request(
        self,
        changes: Sequence[BlueprintChangeRequested],
        *,
        key: str,
        source: str,
        timeout_s: float,
        traceparent: str | None = None,
    ) -> list[ChangeOutcome]:
        """Send the changes that were not sent before, and wait for their verdicts; in the same order.

        Args:
            key: an idempotency key: the n-th change under one key is one change.
            timeout_s: for Kafka (then ``UnavailableError``), and for the projection (then an outcome without a row).

        Raises:
            ContractError: there are more than ``MAX_CHANGES``.
            ConflictError: another change was sent under this key.
            UnavailableError: Kafka or Postgres is away; a retry with the same key is safe.
        """
        if len(changes) > MAX_CHANGES:
            raise ContractError(f"{len(changes)} changes in one call, at most {MAX_CHANGES} allowed; split the call")
        requests = dict(zip(request_ids(key, len(changes)), changes, strict=True))
        judged = await self.judged(list(requests))
        rows = _rows_of(requests, judged)
        if judged.keys() - rows.keys():  # judged for another blueprint
            raise _conflict()
        self._check_conflicts(requests, rows)
        messages = [
            OonaMessage.of(change, id=event_id, source=source, traceparent=traceparent)
            for event_id, change in requests.items()
            if event_id not in rows
        ]
        if messages:
            deliveries = await self._producer.deliver([encode(m) for m in messages], timeout_s=timeout_s)
            deliveries.positions()
            rows = await self._wait_until_judged(requests, timeout_s)
            self._check_conflicts(requests, rows)
        return [ChangeOutcome(event_id, change, rows.get(event_id)) for event_id, change in requests.items()]

    async def judged(self, event_ids: Sequence[UUID]) -> dict[UUID, dict[str, Row]]:
        """Event id -> blueprint -> projected change.

        An id has two rows where two processes sent one key for two blueprints at the same time.
        """
        found: dict[UUID, dict[str, Row]] = {}
        for row in await self._reader.all("changes", event_ids=event_ids):
            found.setdefault(row["event_id"], {})[row["blueprint_id"]] = row
        return found

    async def expected_versions(self, blueprint_ids: Sequence[str], *, key: str) -> dict[str, int]:
        """The version that a change of each blueprint has to name under this key, in the order of the request.

        It is the one that the change named when it was first sent, otherwise the current one: so a repeated command
        is the same request. Blueprints that do not exist are left out.
        """
        rows = await library_queries.versions(self._reader, blueprint_ids)
        versions = {row["blueprint_id"]: row["version"] for row in rows}
        event_ids = request_ids(key, len(blueprint_ids))
        judged = await self.judged(event_ids)
        for event_id, blueprint_id in zip(event_ids, blueprint_ids, strict=True):
            if (row := judged.get(event_id, {}).get(blueprint_id)) is not None:
                versions[blueprint_id] = row["expected_version"]
        return versions

    async def same_change(
        self, change: BlueprintChange, blueprint_ids: Sequence[str], *, key: str, reason: str
    ) -> list[BlueprintChangeRequested]:
        """One change of many blueprints, each at its current version.

        Raises:
            ContractError: a blueprint does not exist.
        """
        unique_ids = list(dict.fromkeys(blueprint_ids))
        versions = await self.expected_versions(unique_ids, key=key)
        unknown = sorted(set(unique_ids) - versions.keys())
        if unknown:
            raise ContractError(f"blueprint {', '.join(unknown)} does not exist; `esper blueprints list` lists all")
        return [
            BlueprintChangeRequested(
                blueprint_id=blueprint_id, change=change, expected_version=versions[blueprint_id], reason=reason
            )
            for blueprint_id in unique_ids
        ]

    def _check_conflicts(self, requests: Requests, rows: Mapping[UUID, Row]) -> None:
        """Compare requests with what this process sent under their ids, and with what the projection has."""
        for event_id, change in requests.items():
            digest = hashlib.sha256(change.model_dump_json().encode()).hexdigest()
            row = rows.get(event_id)
            differs = row is not None and any(row[name] != getattr(change, name) for name in PROJECTED_FIELDS)
            if differs or self._sent.setdefault(event_id, digest) != digest:
                raise _conflict()
        while len(self._sent) > MAX_REMEMBERED:
            del self._sent[next(iter(self._sent))]

    async def _wait_until_judged(self, requests: Requests, timeout_s: float) -> dict[UUID, Row]:
        """The rows that are projected within the time."""
        rows: dict[UUID, Row] = {}
        try:
            async with asyncio.timeout(timeout_s):
                while len(rows := _rows_of(requests, await self.judged(list(requests)))) < len(requests):
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            pass
        return rows


def _rows_of(requests: Requests, judged: Mapping[UUID, Mapping[str, Row]]) -> dict[UUID, Row]:
    """The rows of these requests' own blueprints."""
    rows = {event_id: judged.get(event_id, {}).get(change.blueprint_id) for event_id, change in requests.items()}
    return {event_id: row for event_id, row in rows.items() if row is not None}


def _conflict() -> ConflictError:
    return ConflictError("another request was sent under this Idempotency-Key; choose a new key")
