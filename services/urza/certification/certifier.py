"""Takes proposed blueprints to certified or rejected: each is examined in the sandbox, each step is an event.

The certifier decides nothing: each event names the version that was examined, and ``schemas.change_verdicts`` judges
it. Ids follow from blueprint and version, so several Urzas, or one that restarts, request a change once. Each event
names the one before it as its cause, and joins the trace of the request that made the examined version.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from esper.logging import get_logger
from esper.schemas import ids
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import BlueprintChange, BlueprintStatus
from esper.schemas.events import BlueprintChangeRequested, CertificateIssued
from esper.schemas.messages import OonaMessage
from esper.services.urza import library_queries
from esper.services.urza.certification.sandbox import Sandbox
from esper.services.urza.certification.sandbox_messages import Examination, ExamineJob, reason_of
from esper.services.urza.kernels.examined_kernels import ExaminedKernels
from esper.services.urza.kernels.shipped_blueprints import SOURCE
from esper.services.urza.library_queries import Cause, cause_of
from esper.services.urza.projection_reader import ProjectionReader, Row
from esper.services.urza.settings import UrzaSettings

MAX_PENDING = 50  # of one query

_log = get_logger(__name__)


class Certifier:
    """Examines each version of a blueprint once.

    Args:
        examined: gets the kernels of the blueprints that pass.
    """

    def __init__(
        self,
        reader: ProjectionReader,
        producer: Any,
        sandbox: Sandbox,
        settings: UrzaSettings,
        examined: ExaminedKernels,
    ) -> None:
        self._reader = reader
        self._producer = producer
        self._sandbox = sandbox
        self._settings = settings
        self._examined = examined
        self._answered: set[tuple[str, int]] = set()

    async def certify_pending(self) -> int:
        """Examine the blueprints that wait for it and send the events that follow. Returns their number.

        Raises:
            UnavailableError, NotAllowedError: Kafka or the sandbox is away; the rest still waits.
        """
        rows = await self._pending()
        for row in rows:
            found = await self._examine(row)
            events = certification_events(row["blueprint_id"], row["version"], row["status"], found, cause_of(row))
            await self._producer.send_batch(events)
            self._answered.add((row["blueprint_id"], row["version"]))
            refusal = found.build_error or found.check_error
            log = _log.info if refusal is None else _log.warning
            log("blueprint.examined", blueprint=row["blueprint_id"], version=row["version"], refusal=refusal)
        return len(rows)

    async def _pending(self) -> list[Row]:
        answered_ids = [blueprint_id for blueprint_id, _version in self._answered]
        answered_versions = [version for _blueprint_id, version in self._answered]
        rows = await library_queries.unvalidated(
            self._reader, answered_ids=answered_ids, answered_versions=answered_versions, limit=MAX_PENDING
        )
        versions = await library_queries.versions(self._reader, answered_ids)
        self._answered &= {(r["blueprint_id"], r["version"]) for r in versions}  # the projection has the others
        return rows

    async def _examine(self, row: Row) -> Examination:
        try:
            job = ExamineJob(
                blueprint_id=row["blueprint_id"],
                spec=BlueprintSpec.model_validate(row["spec"]),
                widths=self._settings.certify_widths,
                kernel_rng_seed=self._settings.kernel_rng_seed,
            )
        except ValidationError as error:
            return Examination(build_error=reason_of(f"its spec is invalid: {error}"))
        found = await self._sandbox.examine(job)
        self._examined.keep(job, found)
        return found


def certification_events(
    blueprint_id: str, version: int, status: str, found: Examination, cause: Cause | OonaMessage = Cause()
) -> Sequence[OonaMessage]:
    """The events that follow from an examination of this version, in their order.

    Args:
        status: proposed or compiled; a proposed blueprint is compiled first, unless it cannot be built.
        cause: the change that made this version.
    """

    def request(change: BlueprintChange, version: int, reason: str, cause: Cause | OonaMessage) -> OonaMessage:
        event = BlueprintChangeRequested(
            blueprint_id=blueprint_id, change=change, expected_version=version, reason=reason_of(reason)
        )
        event_id = ids.library_request_id(blueprint_id, version, change)
        return OonaMessage.of(event, id=event_id, source=SOURCE, causation_id=cause.id, traceparent=cause.traceparent)

    if found.build_error is not None:
        return [request(BlueprintChange.REJECT, version, f"it cannot be built: {found.build_error}", cause)]
    events = []
    if status == BlueprintStatus.PROPOSED:
        cause = request(BlueprintChange.COMPILE, version, "it was built for every layer that it names", cause)
        events.append(cause)
        version += 1
    if found.check_error is not None:
        return [*events, request(BlueprintChange.REJECT, version, f"it failed a check: {found.check_error}", cause)]
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
    return [*events, certificate, request(BlueprintChange.CERTIFY, version, passed, certificate)]
