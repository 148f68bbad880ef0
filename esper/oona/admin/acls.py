"""ACLs on the broker: what ``esper.oona.admin.rights`` asks for against what is there.

Invariant: what Esper did not make is never removed unless ``prune`` asks for it, and then only where
it bears on Esper's own topics, group or users.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.admin.admin_client import REQUEST_TIMEOUT_S, admin_names, answers_of, not_for, open_admin
from esper.oona.admin.rights import CLUSTER, Service, rights

IN_FORCE_TIMEOUT_S = 10.0
POLL_S = 0.1
ANY_HOST = "*"
WILDCARD = "*"


class AclState(StrEnum):
    """How an ACL stands against what it should be."""

    PRESENT = "present"
    CREATED = "created"
    MISSING = "missing"
    EXTRA = "extra"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, order=True)
class Acl:
    """One entry, in Kafka's words and in lower case but for the names."""

    principal: str
    resource: str
    name: str
    operation: str
    pattern: str = "literal"
    permission: str = "allow"
    host: str = ANY_HOST


@dataclass(frozen=True, slots=True)
class AclStatus:
    """One entry and how it stands."""

    acl: Acl
    state: AclState


@dataclass(frozen=True, slots=True)
class AclPlan:
    """What should be: the entries that are wanted, and whose they are."""

    wanted: frozenset[Acl]
    principals: frozenset[str]

    @classmethod
    def of(cls, principals: Mapping[Service, str], group: str) -> "AclPlan":
        """The plan for these users and this group of workers."""
        wanted = (Acl(principals[r.service], r.resource, r.name, r.operation) for r in rights(group))
        return cls(frozenset(wanted), frozenset(principals.values()))

    def bears_on(self, acl: Acl) -> bool:
        """Whether an entry changes what somebody may do with Esper's topics, group or users."""
        return acl.principal in self.principals or any(_covers(acl, a) for a in self.wanted)

    def may_prune(self, acl: Acl) -> bool:
        """Whether it bears on nothing else: a pattern of another user's may be about other systems too."""
        is_exact = acl.pattern == "literal" and acl.name not in (WILDCARD, CLUSTER)
        return acl.principal in self.principals or (is_exact and self.bears_on(acl))


async def list_acls(kafka: KafkaSettings, plan: AclPlan) -> list[AclStatus]:
    """Every entry that is wanted or bears on Esper, and how it stands; in order.

    A broker without an authorizer has none, and does not say why.

    Raises:
        NotAllowedError: this user may not see ACLs.
        ConfigError: the extra is not installed.
        UnavailableError: no broker answers.
    """
    return _statuses(plan, await _described(await open_admin(kafka), kafka))


async def apply_acls(kafka: KafkaSettings, plan: AclPlan, *, prune: bool = False) -> list[AclStatus]:
    """Make the entries that are missing; with ``prune`` also remove those that are extra.

    Comes back once the broker goes by them.

    Raises:
        NotAllowedError: this user may not see or change ACLs.
        ConfigError: the broker keeps none, or the extra is not installed.
        UnavailableError: no broker answers.
    """
    admin = await open_admin(kafka)
    before = _statuses(plan, await _described(admin, kafka))
    missing = [s.acl for s in before if s.state is AclState.MISSING]
    doomed = [s.acl for s in before if prune and s.state is AclState.EXTRA and plan.may_prune(s.acl)]
    if missing:
        made = admin.create_acls([_binding(a) for a in missing], request_timeout=REQUEST_TIMEOUT_S)
        await answers_of(made.values(), kafka)
    if doomed:
        gone = admin.delete_acls([_binding(a, as_filter=True) for a in doomed], request_timeout=REQUEST_TIMEOUT_S)
        await answers_of(gone.values(), kafka)
    await _wait_until_in_force(admin, kafka, frozenset(missing), frozenset(doomed))
    changed = {**dict.fromkeys(missing, AclState.CREATED), **dict.fromkeys(doomed, AclState.REMOVED)}
    return [AclStatus(s.acl, changed.get(s.acl, s.state)) for s in before]


async def _wait_until_in_force(admin: Any, kafka: KafkaSettings, made: frozenset[Acl], gone: frozenset[Acl]) -> None:
    """The controller has them at once; brokers go by them when they have read its log."""
    try:
        async with asyncio.timeout(IN_FORCE_TIMEOUT_S):
            while made - (found := await _described(admin, kafka)) or gone & found:
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise UnavailableError(
            f"Kafka took the ACLs, but does not go by them after {IN_FORCE_TIMEOUT_S:.0f} s; see `esper acls list`"
        ) from error


def _statuses(plan: AclPlan, found: frozenset[Acl]) -> list[AclStatus]:
    extra = {a for a in found - plan.wanted if plan.bears_on(a)}
    states = {
        **dict.fromkeys(plan.wanted & found, AclState.PRESENT),
        **dict.fromkeys(plan.wanted - found, AclState.MISSING),
        **dict.fromkeys(extra, AclState.EXTRA),
    }
    return [AclStatus(acl, states[acl]) for acl in sorted(states)]


def _covers(acl: Acl, wanted: Acl) -> bool:
    if acl.resource != wanted.resource:
        return False
    if acl.pattern == "prefixed":
        return wanted.name.startswith(acl.name)
    return acl.name in (wanted.name, WILDCARD)


async def _described(admin: Any, kafka: KafkaSettings) -> frozenset[Acl]:
    of = admin_names()
    cluster = admin.describe_cluster(include_authorized_operations=True, request_timeout=REQUEST_TIMEOUT_S)
    (known,) = await answers_of([cluster], kafka)
    if of.AclOperation.DESCRIBE not in (known.authorized_operations or ()):
        raise not_for(kafka)  # librdkafka drops this error of the next request, and would give no ACLs
    everything = of.AclBindingFilter(
        of.ResourceType.ANY,
        None,
        of.ResourcePatternType.ANY,
        None,
        None,
        of.AclOperation.ANY,
        of.AclPermissionType.ANY,
    )
    (found,) = await answers_of([admin.describe_acls(everything, request_timeout=REQUEST_TIMEOUT_S)], kafka)
    return frozenset(_acl(binding) for binding in found)


def _binding(acl: Acl, *, as_filter: bool = False) -> Any:
    of = admin_names()
    is_cluster = acl.resource == "cluster"  # librdkafka's older name for it is broker
    return (of.AclBindingFilter if as_filter else of.AclBinding)(
        of.ResourceType.BROKER if is_cluster else of.ResourceType[acl.resource.upper()],
        acl.name,
        of.ResourcePatternType[acl.pattern.upper()],
        acl.principal,
        acl.host,
        of.AclOperation[acl.operation.upper()],
        of.AclPermissionType[acl.permission.upper()],
    )


def _acl(binding: Any) -> Acl:
    resource = binding.restype.name.lower()
    return Acl(
        principal=binding.principal,
        resource="cluster" if resource == "broker" else resource,
        name=binding.name,
        operation=binding.operation.name.lower(),
        pattern=binding.resource_pattern_type.name.lower(),
        permission=binding.permission_type.name.lower(),
        host=binding.host,
    )
