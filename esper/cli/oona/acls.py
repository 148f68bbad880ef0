"""`esper acls apply | list | password`: users of the broker and the rights of each service on it."""

import asyncio
from collections import Counter

import typer

from esper.cli.command_group import Commands, add_group
from esper.cli.terminal import new_table, print_line, print_table, read_password
from esper.config import Settings, load_settings
from esper.errors import ConfigError
from esper.oona.admin.acls import AclPlan, AclState, AclStatus, apply_acls, list_acls
from esper.oona.admin.rights import Service, default_principals
from esper.oona.admin.scram_users import set_passwords
from esper.streams.settings import StreamsSettings

_STYLES = {AclState.CREATED: "green", AclState.MISSING: "red", AclState.EXTRA: "yellow", AclState.REMOVED: "yellow"}

_PRINCIPALS = typer.Option(
    None, "--principal", help="SERVICE=USER, for a service whose user is not esper-SERVICE. Repeatable."
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands: Commands = {"apply": apply, "list": list_all, "password": set_password}
    add_group(app, "acls", "Manage Kafka users and the rights of services.", commands)


def apply(
    principal: list[str] | None = _PRINCIPALS,
    prune: bool = typer.Option(False, "--prune", help="Also remove other ACLs on Esper's topics."),
) -> None:
    """Create missing ACLs. Needs the broker's administrator."""
    settings = load_settings()
    found = asyncio.run(apply_acls(settings.need_kafka(), _plan(settings, principal), prune=prune))
    _print_statuses(found)
    if any(s.state is AclState.EXTRA for s in found):
        left = "wider patterns and cluster rights are kept" if prune else "they are kept; `--prune` removes them"
        print_line(f"extra ACLs do not belong to Esper: {left}")


def list_all(principal: list[str] | None = _PRINCIPALS) -> None:
    """List the ACLs that Esper needs and all others on its topics."""
    settings = load_settings()
    found = asyncio.run(list_acls(settings.need_kafka(), _plan(settings, principal)))
    _print_statuses(found)
    if all(s.state is AclState.MISSING for s in found):
        print_line("the broker has no ACLs; unless authorizer.class.name is set, every client may do everything")


def set_password(
    user: str = typer.Argument(..., help="User name, e.g. esper-tamiyo. Created if it does not exist."),
    mechanism: str = typer.Option("SCRAM-SHA-512", help="SASL mechanism of the user."),
) -> None:
    """Create a user or change its password. Prompts for the password, or reads the first line of stdin."""
    kafka = load_settings().need_kafka()
    asyncio.run(set_passwords(kafka, {user: read_password()}, mechanism))
    typer.echo(f"{user} has the new password; open connections are not closed")


def _plan(settings: Settings, named: list[str] | None) -> AclPlan:
    principals = default_principals()
    for option in named or ():
        service, separator, user = option.partition("=")
        if not separator or not user or service not in [*Service]:
            raise ConfigError(f"--principal {option}: write SERVICE=USER, SERVICE one of {', '.join(Service)}")
        principals[Service(service)] = user if ":" in user else f"User:{user}"
    return AclPlan.of(principals, settings.section("streams", StreamsSettings).group)


def _print_statuses(found: list[AclStatus]) -> None:
    table = new_table("principal", "resource", "name", "operation", "state")
    for status in found:
        acl, style = status.acl, _STYLES.get(status.state, "")
        name = f"{acl.name}*" if acl.pattern == "prefixed" else acl.name
        operation = acl.operation if acl.permission == "allow" else f"NOT {acl.operation}"
        table.add_row(acl.principal, acl.resource, name, operation, str(status.state), style=style)
    print_table(table)
    counts = Counter(s.state for s in found)
    print_line(", ".join(f"{counts[state]} {state}" for state in AclState if counts[state]))
