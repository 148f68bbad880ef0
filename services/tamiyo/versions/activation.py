"""Which version decides is changed by events alone: the gate before an activation, and the way back.

Pure. Invariant: a version takes over when its newest evaluation against the one that is active says
that it is better; or when somebody forces it, and then the event says so, and why.
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

FORCED = "forced"
"""``parameters[FORCED]`` of an activation that the gate refused."""


def find_version(
    policy_id: str,
    version: int,
    trained: Iterable[TrainedVersion],
    changes: Iterable[PolicyChange],
    tamiyo: TamiyoSettings,
) -> PolicyVersion:
    """A version by its name: trained, active before, or a baseline of Esper's.

    Raises:
        ConfigError: there is none; the message says which there are.
    """
    of_policy: dict[int, PolicyVersion] = {}
    for one in (*(t.version for t in trained), *(c.version for c in changes)):
        if one.policy_id == policy_id:
            of_policy.setdefault(one.version, one)
    if version in of_policy:
        found = of_policy[version]
        kept = {n: v for n, v in found.parameters.items() if n not in (FORCED, NAMED_BY)}
        return PolicyVersion(policy_id, version, found.kind, kept, found.weights)
    if policy_id in BASELINES:
        return PolicyVersion(policy_id, version, policy_id, policy_parameters(policy_id, tamiyo))
    there = ", ".join(f"v{n}" for n in sorted(of_policy)) or "none"
    raise ConfigError(
        f"{policy_id} v{version} was never trained (of this policy: {there}): see `esper tamiyo policies`"
    )


def refusal_reason(wanted: PolicyVersion, active: PolicyChange | None, found: Iterable[Evaluation]) -> str | None:
    """Why the gate refuses ``wanted``, or None where it may take over.

    Args:
        found: evaluations; those of one policy in the order of the log.
    """
    of_wanted = [e for e in found if (e.policy_id, e.policy_version) == (wanted.policy_id, wanted.version)]
    if active is not None:
        rival = active.version
        of_wanted = [
            e for e in of_wanted if (e.against_policy_id, e.against_version) == (rival.policy_id, rival.version)
        ]
    against = "anything" if active is None else f"{active.version}, which is active"
    if not of_wanted:
        return f"{wanted} was not evaluated against {against}"
    newest = of_wanted[-1]
    if newest.verdict is EvaluationVerdict.BETTER:
        return None
    told = {EvaluationVerdict.NOT_BETTER: "is not better than", EvaluationVerdict.TOO_THIN: "cannot be compared with"}
    return f"{wanted} {told[newest.verdict]} {against}, says its newest evaluation: {newest.reason}"


def activation(
    wanted: PolicyVersion,
    active: PolicyChange | None,
    reason: str,
    source: str,
    *,
    refused: str | None = None,
    is_forced: bool = False,
) -> OonaMessage:
    """The event that has ``wanted`` decide from here on.

    Args:
        refused: why the gate refuses it.
        is_forced: whether it is activated all the same.

    Raises:
        ConflictError: it is active already, or the gate refuses it.
    """
    if active is not None and _named(active.version) == _named(wanted):
        raise ConflictError(f"{wanted} is active already, since {active.since:%Y-%m-%d %H:%M:%S} UTC")
    if refused is not None and not is_forced:
        raise ConflictError(f"{refused}; --force activates it all the same, and its reason is kept in the log")
    if not reason.strip():
        raise ConfigError("say why, by --reason: it is kept in the log")
    forced = {FORCED: True} if refused is not None else {}
    told = f"{reason} (forced: {refused})" if refused is not None else reason
    event_id = uuid.uuid4()
    event = PolicyActivated(
        policy_id=wanted.policy_id,
        policy_version=wanted.version,
        kind=wanted.kind,
        parameters={**wanted.parameters, **forced},
        activation_id=event_id,
        reason=told[:2000],
    )
    return OonaMessage.of(event, id=event_id, source=source, causation_id=active.id if active else None)


def announcement(
    version: PolicyVersion, changes: Sequence[PolicyChange], source: str, *, is_fixed: bool
) -> OonaMessage | None:
    """What a controller says at its start of who decides; None where the log says so already.

    One with a fixed policy speaks for itself: no other follows it. One that follows the log speaks only where that
    names nobody; several that start at once say it with one id.
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
        reason="named by the settings when Tamiyo started" if is_fixed else "the log named nobody: the default decides",
    )
    return OonaMessage.of(event, id=event_id, source=source)


def standing_activations(changes: Sequence[PolicyChange]) -> list[PolicyChange]:
    """The activations that stand, the oldest first: a rollback takes away those that came after what it went back to.

    Args:
        changes: the newest first, without those by settings.
    """
    standing: list[PolicyChange] = []
    for change in reversed(changes):
        places = [n for n, one in enumerate(standing) if _named(one.version) == _named(change.version)]
        if change.rolled_back_from is not None and places:
            del standing[places[-1] + 1 :]
        else:
            standing.append(change)
    return standing


def rollback(
    changes: Sequence[PolicyChange], reason: str, source: str, event_id: uuid.UUID | None = None
) -> OonaMessage:
    """The event that has the version decide again which did before the one that is active.

    Args:
        changes: as of ``line``.
        event_id: of the event; another one each time where none is given.

    Raises:
        ConflictError: there was none before it.
    """
    standing = standing_activations(changes)
    if not standing:
        raise ConflictError("no policy is active: there is nothing to go back from")
    if len(standing) < 2:
        raise ConflictError(f"{standing[-1].version} is the first that was active: there is nothing to go back to")
    if not reason.strip():
        raise ConfigError("say why, by --reason: it is kept in the log")
    active, before = standing[-1].version, standing[-2].version
    event = PolicyRolledBack(
        policy_id=active.policy_id,
        policy_version=active.version,
        to_policy_id=before.policy_id,
        to_version=before.version,
        kind=before.kind,
        parameters=before.parameters,
        reason=reason[:2000],
    )
    return OonaMessage.of(event, id=event_id or uuid.uuid4(), source=source, causation_id=changes[0].id)


def _named(version: PolicyVersion) -> tuple[str, int]:
    return version.policy_id, version.version
