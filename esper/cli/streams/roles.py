"""`esper roles`: who may read and who may write, in Postgres and at Urza's API."""

import secrets
import sys

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from esper.config import load_settings
from esper.errors import ConfigError
from esper.streams.database.roles import RIGHTS, DatabaseRole, apply_roles, make_user, members

TOKEN_BYTES = 32


def register(app: typer.Typer) -> None:
    """Add the commands."""
    roles = typer.Typer(no_args_is_help=True, help="Who may read and who may write: in Postgres, at Urza's API.")
    roles.command()(apply)
    roles.command("list")(list_all)
    roles.command()(user)
    roles.command()(token)
    app.add_typer(roles, name="roles")


def apply() -> None:
    """Make the groups esper_reader and esper_writer and give them their rights; run it as the schema's owner."""
    made = apply_roles(load_settings().need_postgres())
    table = Table("group", "on every table", "for", "state")
    purposes = {DatabaseRole.READER: "Urza, Tamiyo", DatabaseRole.WRITER: "workers"}
    for role in DatabaseRole:
        state = "created" if role in made else "there"
        table.add_row(role.group, ", ".join(RIGHTS[role]), purposes[role], state)
    Console().print(table)


def list_all() -> None:
    """Show who is in which group."""
    table = Table("group", "user", "logs in")
    for member in members(load_settings().need_postgres()):
        table.add_row(member.role.group, member.user, "yes" if member.can_login else "no")
    Console().print(table)


def user(
    name: str = typer.Argument(..., help="e.g. esper_urza; made where Postgres does not know it."),
    role: DatabaseRole = typer.Option(..., help="What it does."),
    password: bool = typer.Option(True, help="Ask for a password, or read the first line of stdin."),
) -> None:
    """Make a user of Postgres for one service, or change its password."""
    chosen = _password() if password else None
    is_new = make_user(load_settings().need_postgres(), name, role, chosen)
    typer.echo(f"{name} is {'made and ' if is_new else ''}a {role} now; put it into ESPER_POSTGRES__DSN of its service")


def token(
    role: DatabaseRole = typer.Option(..., help="What its holder may do at Urza's API."),
) -> None:
    """Make a token for Urza's API: it is shown once, Urza's settings hold its SHA-256."""
    from esper.services.urza.settings import token_hash

    made = secrets.token_urlsafe(TOKEN_BYTES)
    variable = f"ESPER_URZA__{role.name}_TOKENS_SHA256"
    typer.echo(f"token, for who asks:  {made}")
    typer.echo(f"for Urza:             {variable}={token_hash(made)}")
    typer.echo(f"several go side by side in {variable}, separated by commas; take one out to end it")


def _password() -> SecretStr:
    if sys.stdin.isatty():
        return SecretStr(typer.prompt("password", hide_input=True, confirmation_prompt=True))
    line = sys.stdin.readline().rstrip("\n")
    if not line:
        raise ConfigError("the first line of stdin is no password; --no-password leaves it as it is")
    return SecretStr(line)
