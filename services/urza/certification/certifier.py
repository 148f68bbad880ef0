"""Takes proposed blueprints to certified or rejected: examined in the sandbox, every step an event of the log.

Nothing is decided here: each event names the version that was seen, and the verdict in ``schemas.verdicts`` says
what counts. Ids follow from blueprint and version, so several Urzas, or one that died half way, ask once. Each event
names the one before it as its cause, and is in the trace of whoever asked for the version that was examined.
"""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from esper.logging import get_logger
from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import BlueprintChange, BlueprintStatus
from esper.schemas.events import BlueprintChangeRequested, CertificateIssued
from esper.schemas.messages import OonaMessage
from esper.services.urza.certification.sandbox import Sandbox
from esper.services.urza.certification.sandbox_jobs import Examination, ExamineJob, reason_of
from esper.services.urza.kernels.shipped_blueprints import SOURCE
from esper.services.urza.library_queries import Cause, cause_of
from esper.services.urza.settings import UrzaSettings
from esper.streams.database.connection_types import Pool
from esper.streams.database.sql_queries import queries

MAX_WAITING = 50  # of one look

_log = get_logger(__name__)


class Certifier:
    """Examines each version of a blueprint once. ``pool`` has the projections."""

    def __init__(self, pool: Pool, producer: Any, sandbox: Sandbox, settings: UrzaSettings) -> None:
        self._pool = pool
        self._producer = producer
        self._sandbox = sandbox
        self._settings = settings
        self._answered: dict[tuple[str, int], None] = {}

    async def certify_pending(self) -> int:
        """Examine the blueprints that wait for it, and say what became of each; gives their number.

        Raises:
            UnavailableError, NotAllowedError: Kafka or the sandbox is away; who was not answered still waits.
        """
        rows = await self._waiting()
        for row in rows:
            found = await self._examine(row)
            answers = certification_events(row["blueprint_id"], row["version"], row["status"], found, cause_of(row))
            await self._producer.send_batch(answers)
            self._answered[row["blueprint_id"], row["version"]] = None
            refusal = found.build_error or found.check_error
            log = _log.info if refusal is None else _log.warning
            log("blueprint.examined", blueprint=row["blueprint_id"], version=row["version"], refusal=refusal)
        return len(rows)

    async def _waiting(self) -> list[Any]:
        answered = list(self._answered)
        async with self._pool.acquire() as connection:
            found = queries("library").not_validated(
                connection,
                answered_ids=[blueprint_id for blueprint_id, _version in answered],
                answered_versions=[version for _blueprint_id, version in answered],
                limit=MAX_WAITING,
            )
            rows = [r async for r in found]
            versions = queries("library").versions(connection, blueprint_ids=[i for i, _version in answered])
            now = {(r["blueprint_id"], r["version"]) async for r in versions}
        self._answered = {key: None for key in answered if key in now}  # the projection shows the others
        return rows

    async def _examine(self, row: Any) -> Examination:
        try:
            job = ExamineJob(
                blueprint_id=row["blueprint_id"],
                spec=BlueprintSpec.model_validate(json.loads(row["spec"])),
                widths=self._settings.certify_widths,
                kernel_rng_seed=self._settings.kernel_rng_seed,
            )
        except (ValidationError, ValueError) as error:
            return Examination(build_error=reason_of(f"its spec cannot be read: {error}"))
        return await self._sandbox.examine(job)


def certification_events(
    blueprint_id: str, version: int, status: str, found: Examination, cause: Cause | OonaMessage = Cause()
) -> Sequence[OonaMessage]:
    """The events that follow from an examination of this version, in their order.

    Args:
        status: proposed or compiled; what was proposed is compiled first, unless it cannot be built.
        cause: the change that made this version.
    """

    def change(what: BlueprintChange, seen: int, reason: str, cause: Cause | OonaMessage) -> OonaMessage:
        event = BlueprintChangeRequested(
            blueprint_id=blueprint_id, change=what, expected_version=seen, reason=reason_of(reason)
        )
        event_id = ids.library_request_id(blueprint_id, seen, what)
        return OonaMessage.of(event, id=event_id, source=SOURCE, causation_id=cause.id, traceparent=cause.traceparent)

    if found.build_error is not None:
        return [change(BlueprintChange.REJECT, version, f"it cannot be built: {found.build_error}", cause)]
    answers = []
    if status == BlueprintStatus.PROPOSED:
        cause = change(BlueprintChange.COMPILE, version, "it was built for every layer that it names", cause)
        answers.append(cause)
        version += 1
    if found.check_error is not None:
        return [*answers, change(BlueprintChange.REJECT, version, f"it failed a check: {found.check_error}", cause)]
    certificate = OonaMessage.of(
        CertificateIssued(
            blueprint_id=blueprint_id,
            blueprint_version=version,
            examiner=found.examiner,
            checks=found.checks,
            measurements=found.measurements,
        ),
        id=ids.certificate_id(blueprint_id, version),
        source=SOURCE,
        causation_id=cause.id,
        traceparent=cause.traceparent,
    )
    passed = f"it passed {', '.join(found.checks)}"
    return [*answers, certificate, change(BlueprintChange.CERTIFY, version, passed, certificate)]
