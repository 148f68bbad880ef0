"""`esper acls`: give each service its user and its rights on the broker, look at who has which."""

import asyncio
import sys
from collections import Counter

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from esper.config import Settings, load_settings
from esper.errors import ConfigError
from esper.oona.admin.acls import AclPlan, AclState, AclStatus, apply_acls, list_acls
from esper.oona.admin.rights import Service, default_principals
from esper.oona.admin.scram_users import set_passwords
from esper.streams.settings import StreamsSettings

_STYLES = {AclState.CREATED: "green", AclState.MISSING: "red", AclState.EXTRA: "yellow", AclState.REMOVED: "yellow"}

_PRINCIPALS = typer.Option(
    None, "--principal", help="SERVICE=USER, for a service whose user is not esper-SERVICE; may be repeated."
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    acls = typer.Typer(no_args_is_help=True, help="Who may do what on the broker.")
    acls.command("apply")(apply)
    acls.command("list")(list_all)
    acls.command("password")(set_password)
    app.add_typer(acls, name="acls")


def apply(
    principal: list[str] | None = _PRINCIPALS,
    prune: bool = typer.Option(False, "--prune", help="Also remove what Esper did not ask for on its own topics."),
) -> None:
    """Make the rights that are missing; run it as the broker's administrator."""
    settings = load_settings()
    found = asyncio.run(apply_acls(settings.need_kafka(), _plan(settings, principal), prune=prune))
    _show(found)
    if any(s.state is AclState.EXTRA for s in found):
        left = "others' patterns and cluster rights stay" if prune else "they stay; --prune removes them"
        Console().print(f"extra rights are not Esper's: {left}")


def list_all(principal: list[str] | None = _PRINCIPALS) -> None:
    """Show every right that Esper needs or that bears on its topics, and how it stands."""
    settings = load_settings()
    found = asyncio.run(list_acls(settings.need_kafka(), _plan(settings, principal)))
    _show(found)
    if all(s.state is AclState.MISSING for s in found):
        Console().print("the broker reports no ACL: without authorizer.class.name everybody may do everything")


def set_password(
    user: str = typer.Argument(..., help="e.g. esper-tamiyo; made where the broker does not know it."),
    mechanism: str = typer.Option("SCRAM-SHA-512", help="How the user says who it is."),
) -> None:
    """Make a user, or change its password: asked for here, or the first line of stdin."""
    if sys.stdin.isatty():
        password = typer.prompt("password", hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    kafka = load_settings().need_kafka()
    asyncio.run(set_passwords(kafka, {user: SecretStr(password)}, mechanism))
    typer.echo(f"{user} has the new password; what is connected stays so until it connects again")


def _plan(settings: Settings, named: list[str] | None) -> AclPlan:
    principals = default_principals()
    for option in named or ():
        service, separator, user = option.partition("=")
        if not separator or not user or service not in [*Service]:
            raise ConfigError(f"--principal {option}: write SERVICE=USER, SERVICE one of {', '.join(Service)}")
        principals[Service(service)] = user if ":" in user else f"User:{user}"
    return AclPlan.of(principals, settings.section("streams", StreamsSettings).group)


def _show(found: list[AclStatus]) -> None:
    table = Table("principal", "resource", "name", "operation", "state")
    for status in found:
        acl, style = status.acl, _STYLES.get(status.state, "")
        name = f"{acl.name}*" if acl.pattern == "prefixed" else acl.name
        operation = acl.operation if acl.permission == "allow" else f"NOT {acl.operation}"
        table.add_row(acl.principal, acl.resource, name, operation, str(status.state), style=style)
    console = Console()
    console.print(table)
    counts = Counter(s.state for s in found)
    console.print(", ".join(f"{counts[state]} {state}" for state in AclState if counts[state]))
