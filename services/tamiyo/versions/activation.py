"""Activation and rollback of policy versions: the events, and the check before an activation.

Pure. Invariant: a version becomes active if its newest evaluation against the active version calls it better, or if an
operator forces it; the event then records that, with the reason.
"""

import uuid
from collections.abc import Iterable, Sequence

from esper.errors import ConfigError, ConflictError
from esper.schemas.enums import EvaluationVerdict
from esper.schemas.events import PolicyActivated, PolicyRolledBack
from esper.schemas.events.policies import BY_SETTINGS, NAMED_BY
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.policies.policy_sources import BASELINES, policy_parameters
from esper.services.tamiyo.settings import TamiyoSettings
from esper.streams.read_models.policy_versions import Evaluation, PolicyChange, PolicyVersion, TrainedVersion

MAX_REASON_CHARS = 2000  # the contract's limit
FORCED = "forced"
"""``parameters[FORCED]`` marks an activation that the check refused."""


def find_version(
    policy_id: str,
    version: int,
    trained: Iterable[TrainedVersion],
    changes: Iterable[PolicyChange],
    tamiyo: TamiyoSettings,
) -> PolicyVersion:
    """Return a version by its name: one that was trained or active before, or a baseline.

    Raises:
        ConfigError: it does not exist; the message lists the versions of this policy.
    """
    versions: dict[int, PolicyVersion] = {}
    for one in (*(t.version for t in trained), *(c.version for c in changes)):
        if one.policy_id == policy_id:
            versions.setdefault(one.version, one)
    if version in versions:
        found = versions[version]
        parameters = {n: v for n, v in found.parameters.items() if n not in (FORCED, NAMED_BY)}
        return PolicyVersion(policy_id, version, found.kind, parameters, found.weights)
    if policy_id in BASELINES:
        return PolicyVersion(policy_id, version, policy_id, policy_parameters(policy_id, tamiyo))
    known = ", ".join(f"v{n}" for n in sorted(versions)) or "none"
    raise ConfigError(
        f"{policy_id} v{version} does not exist; the trained versions of this policy: {known} (`esper tamiyo policies`)"
    )


def refusal_reason(
    candidate: PolicyVersion, active: PolicyChange | None, evaluations: Iterable[Evaluation]
) -> str | None:
    """Return why ``candidate`` must not be activated, or None if it may.

    Args:
        evaluations: those of one policy in the order of the log.
    """
    relevant = [e for e in evaluations if (e.policy_id, e.policy_version) == _key(candidate)]
    if active is not None:
        relevant = [e for e in relevant if (e.against_policy_id, e.against_version) == _key(active.version)]
    against = "anything" if active is None else f"{active.version}, which is active"
    if not relevant:
        return f"{candidate} was not evaluated against {against}"
    newest = relevant[-1]
    if newest.verdict is EvaluationVerdict.BETTER:
        return None
    verdicts = {
        EvaluationVerdict.NOT_BETTER: "is not better than",
        EvaluationVerdict.TOO_THIN: "cannot be compared with",
    }
    return f"{candidate} {verdicts[newest.verdict]} {against}, by its newest evaluation: {newest.reason}"


def activation(
    candidate: PolicyVersion,
    active: PolicyChange | None,
    reason: str,
    source: str,
    *,
    refused: str | None = None,
    is_forced: bool = False,
) -> OonaMessage:
    """Return the event that makes ``candidate`` the active version.

    Args:
        refused: the reason of ``refusal_reason``.
        is_forced: activate it although it is refused.

    Raises:
        ConflictError: it is active already, or refused.
        ConfigError: the reason is empty.
    """
    if active is not None and _key(active.version) == _key(candidate):
        raise ConflictError(f"{candidate} is active already, since {active.since:%Y-%m-%d %H:%M:%S} UTC")
    if refused is not None and not is_forced:
        raise ConflictError(f"{refused}; --force activates it anyway and records that in the log")
    _check_reason(reason)
    event_id = uuid.uuid4()
    event = PolicyActivated(
        policy_id=candidate.policy_id,
        policy_version=candidate.version,
        kind=candidate.kind,
        parameters={**candidate.parameters, **({} if refused is None else {FORCED: True})},
        activation_id=event_id,
        reason=(reason if refused is None else f"{reason} (forced: {refused})")[:MAX_REASON_CHARS],
    )
    return OonaMessage.of(event, id=event_id, source=source, causation_id=active.id if active else None)


def announcement(
    version: PolicyVersion, changes: Sequence[PolicyChange], source: str, *, is_fixed: bool
) -> OonaMessage | None:
    """Return the event by which a starting controller names the policy that decides; None if the log names it already.

    A controller with a fixed policy announces its own. One that follows the log announces the default, and only if the
    log names no version. Controllers that start together write one event: its id follows from its content.
    """
    own = [c for c in changes if c.version.policy_id == version.policy_id] if is_fixed else list(changes)
    if own and (not is_fixed or own[0].version.version == version.version):
        return None
    event_id = uuid.uuid5(own[0].id if own else uuid.NAMESPACE_OID, f"{version} {version.parameters} {is_fixed}")
    event = PolicyActivated(
        policy_id=version.policy_id,
        policy_version=version.version,
        kind=version.kind,
        parameters={**version.parameters, **({NAMED_BY: BY_SETTINGS} if is_fixed else {})},
        activation_id=event_id,
        reason="set by the settings of this controller" if is_fixed else "default: the log named no active version",
    )
    return OonaMessage.of(event, id=event_id, source=source)


def standing_activations(changes: Sequence[PolicyChange]) -> list[PolicyChange]:
    """Return the activations that are in force, oldest first: a rollback cancels those after its target.

    Args:
        changes: newest first, without those by settings.
    """
    standing: list[PolicyChange] = []
    for change in reversed(changes):
        targets = [n for n, one in enumerate(standing) if _key(one.version) == _key(change.version)]
        if change.rolled_back_from is not None and targets:
            del standing[targets[-1] + 1 :]
        else:
            standing.append(change)
    return standing


def rollback(
    changes: Sequence[PolicyChange], reason: str, source: str, event_id: uuid.UUID | None = None
) -> OonaMessage:
    """Return the event that activates the version before the active one again.

    Args:
        changes: as in ``standing_activations``.
        event_id: the id of the event; random by default.

    Raises:
        ConflictError: there is no version before it.
        ConfigError: the reason is empty.
    """
    standing = standing_activations(changes)
    if not standing:
        raise ConflictError("nothing to roll back: no policy is active; `esper tamiyo activate` activates one")
    if len(standing) < 2:
        raise ConflictError(
            f"nothing to roll back to: {standing[-1].version} was the first active version; activate another instead"
        )
    _check_reason(reason)
    active, before = standing[-1].version, standing[-2].version
    event = PolicyRolledBack(
        policy_id=active.policy_id,
        policy_version=active.version,
        to_policy_id=before.policy_id,
        to_version=before.version,
        kind=before.kind,
        parameters=before.parameters,
        reason=reason[:MAX_REASON_CHARS],
    )
    return OonaMessage.of(event, id=event_id or uuid.uuid4(), source=source, causation_id=changes[0].id)


def _check_reason(reason: str) -> None:
    if not reason.strip():
        raise ConfigError("the reason is empty; give one with --reason, it is kept in the log")


def _key(version: PolicyVersion) -> tuple[str, int]:
    return version.policy_id, version.version
