"""ACLs on the broker: compares those that ``esper.oona.admin.rights`` requires with those that exist.

Invariant: an ACL that Esper did not create is removed only with ``prune``, and only if it concerns Esper's own
topics, group or users.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from esper.config import KafkaSettings
from esper.errors import UnavailableError
from esper.oona.admin.admin_client import (
    REQUEST_TIMEOUT_S,
    confluent_admin,
    not_administrator_error,
    open_admin,
    wait_for_results,
)
from esper.oona.admin.rights import CLUSTER, Service, rights

ENFORCED_TIMEOUT_S = 10.0
POLL_S = 0.1
ANY_HOST = "*"
WILDCARD = "*"


class AclState(StrEnum):
    """How an ACL on the broker compares with what Esper requires."""

    PRESENT = "present"
    CREATED = "created"
    MISSING = "missing"
    EXTRA = "extra"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, order=True)
class Acl:
    """One ACL, in Kafka's terms; everything but principal and name is in lower case."""

    principal: str
    resource: str
    name: str
    operation: str
    pattern: str = "literal"
    permission: str = "allow"
    host: str = ANY_HOST


@dataclass(frozen=True, slots=True)
class AclStatus:
    """One ACL and its state."""

    acl: Acl
    state: AclState


@dataclass(frozen=True, slots=True)
class AclPlan:
    """The ACLs that Esper requires, and the principals that they are for."""

    required: frozenset[Acl]
    principals: frozenset[str]

    @classmethod
    def of(cls, principals: Mapping[Service, str], group: str) -> "AclPlan":
        """The plan for these principals and the consumer group of the stream workers."""
        required = (Acl(principals[r.service], r.resource, r.name, r.operation) for r in rights(group))
        return cls(frozenset(required), frozenset(principals.values()))

    def affects_esper(self, acl: Acl) -> bool:
        """Whether an ACL concerns Esper's topics, group or users."""
        return acl.principal in self.principals or any(_covers(acl, a) for a in self.required)

    def may_prune(self, acl: Acl) -> bool:
        """Whether an ACL concerns Esper alone. A pattern of another user may concern other systems too."""
        is_exact = acl.pattern == "literal" and acl.name not in (WILDCARD, CLUSTER)
        return acl.principal in self.principals or (is_exact and self.affects_esper(acl))


async def list_acls(kafka: KafkaSettings, plan: AclPlan) -> list[AclStatus]:
    """The ACLs that are required or concern Esper, with their state, in order.

    A broker without an authorizer returns none, and no error.

    Raises:
        NotAllowedError: this user may not see ACLs.
        ConfigError: the extra ``esper[admin]`` is not installed.
        UnavailableError: no broker answers.
    """
    return _statuses(plan, await _describe(await open_admin(kafka), kafka))


async def apply_acls(kafka: KafkaSettings, plan: AclPlan, *, prune: bool = False) -> list[AclStatus]:
    """Create the missing ACLs; with ``prune`` also remove the extra ones.

    Returns once the broker enforces them.

    Raises:
        NotAllowedError: this user may not see or change ACLs.
        ConfigError: the broker has no authorizer, or the extra ``esper[admin]`` is not installed.
        UnavailableError: no broker answers, or it does not enforce the ACLs within 10 s.
    """
    admin = await open_admin(kafka)
    before = _statuses(plan, await _describe(admin, kafka))
    missing = [s.acl for s in before if s.state is AclState.MISSING]
    extra = [s.acl for s in before if prune and s.state is AclState.EXTRA and plan.may_prune(s.acl)]
    if missing:
        created = admin.create_acls([_binding(a) for a in missing], request_timeout=REQUEST_TIMEOUT_S)
        await wait_for_results(created.values(), kafka)
    if extra:
        removed = admin.delete_acls([_binding(a, as_filter=True) for a in extra], request_timeout=REQUEST_TIMEOUT_S)
        await wait_for_results(removed.values(), kafka)
    await _wait_until_enforced(admin, kafka, frozenset(missing), frozenset(extra))
    changed = {**dict.fromkeys(missing, AclState.CREATED), **dict.fromkeys(extra, AclState.REMOVED)}
    return [AclStatus(s.acl, changed.get(s.acl, s.state)) for s in before]


async def _wait_until_enforced(
    admin: Any, kafka: KafkaSettings, created: frozenset[Acl], removed: frozenset[Acl]
) -> None:
    """Wait for the brokers: the controller stores ACLs at once, brokers enforce them when they have read its log."""
    try:
        async with asyncio.timeout(ENFORCED_TIMEOUT_S):
            while created - (found := await _describe(admin, kafka)) or removed & found:
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise UnavailableError(
            f"Kafka accepted the ACLs but does not enforce them after {ENFORCED_TIMEOUT_S:.0f} s; "
            "check `esper acls list`"
        ) from error


def _statuses(plan: AclPlan, found: frozenset[Acl]) -> list[AclStatus]:
    extra = {a for a in found - plan.required if plan.affects_esper(a)}
    states = {
        **dict.fromkeys(plan.required & found, AclState.PRESENT),
        **dict.fromkeys(plan.required - found, AclState.MISSING),
        **dict.fromkeys(extra, AclState.EXTRA),
    }
    return [AclStatus(acl, states[acl]) for acl in sorted(states)]


def _covers(acl: Acl, required: Acl) -> bool:
    if acl.resource != required.resource:
        return False
    if acl.pattern == "prefixed":
        return required.name.startswith(acl.name)
    return acl.name in (required.name, WILDCARD)


async def _describe(admin: Any, kafka: KafkaSettings) -> frozenset[Acl]:
    confluent = confluent_admin()
    cluster = admin.describe_cluster(include_authorized_operations=True, request_timeout=REQUEST_TIMEOUT_S)
    (description,) = await wait_for_results([cluster], kafka)
    if confluent.AclOperation.DESCRIBE not in (description.authorized_operations or ()):
        raise not_administrator_error(kafka)  # librdkafka would drop the error of the next request and return no ACLs
    any_acl = confluent.AclBindingFilter(
        confluent.ResourceType.ANY,
        None,
        confluent.ResourcePatternType.ANY,
        None,
        None,
        confluent.AclOperation.ANY,
        confluent.AclPermissionType.ANY,
    )
    (found,) = await wait_for_results([admin.describe_acls(any_acl, request_timeout=REQUEST_TIMEOUT_S)], kafka)
    return frozenset(_acl(binding) for binding in found)


def _binding(acl: Acl, *, as_filter: bool = False) -> Any:
    confluent = confluent_admin()
    is_cluster = acl.resource == "cluster"  # librdkafka's older name of the cluster is broker
    return (confluent.AclBindingFilter if as_filter else confluent.AclBinding)(
        confluent.ResourceType.BROKER if is_cluster else confluent.ResourceType[acl.resource.upper()],
        acl.name,
        confluent.ResourcePatternType[acl.pattern.upper()],
        acl.principal,
        acl.host,
        confluent.AclOperation[acl.operation.upper()],
        confluent.AclPermissionType[acl.permission.upper()],
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
