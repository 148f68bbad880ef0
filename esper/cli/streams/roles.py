"""`esper roles apply | list | user | token`: access to Postgres and to Urza's API."""

import secrets

import typer

from esper.cli.command_group import Commands, add_group
from esper.cli.terminal import new_table, print_table, read_password
from esper.config import load_settings
from esper.streams.database.roles import PRIVILEGES, DatabaseRole, apply_roles, make_user, members

TOKEN_BYTES = 32


def register(app: typer.Typer) -> None:
    """Add the commands."""
    commands: Commands = {"apply": apply, "list": list_all, "user": user, "token": token}
    add_group(app, "roles", "Manage users of Postgres and tokens of Urza's API.", commands)


def apply() -> None:
    """Create the groups esper_reader and esper_writer with their rights. Needs the owner of the schema."""
    created = apply_roles(load_settings().need_postgres())
    users = {DatabaseRole.READER: "Urza, Tamiyo", DatabaseRole.WRITER: "workers"}
    rows = [
        (r.group, ", ".join(PRIVILEGES[r]), users[r], "created" if r in created else "exists") for r in DatabaseRole
    ]
    print_table(new_table("group", "rights on every table", "used by", "state", rows=rows))


def list_all() -> None:
    """List the members of each group."""
    found = members(load_settings().need_postgres())
    rows = [(member.role.group, member.user, "yes" if member.can_login else "no") for member in found]
    print_table(new_table("group", "user", "can log in", rows=rows))


def user(
    name: str = typer.Argument(..., help="User name, e.g. esper_urza. Created if it does not exist."),
    role: DatabaseRole = typer.Option(..., help="Role of the user."),
    password: bool = typer.Option(True, help="Set a password: prompts for it, or reads the first line of stdin."),
) -> None:
    """Create a Postgres user for a service, or change its password."""
    chosen = read_password() if password else None
    is_new = make_user(load_settings().need_postgres(), name, role, chosen)
    typer.echo(f"{name} {'created as' if is_new else 'is now'} a {role}; set ESPER_POSTGRES__DSN of its service")


def token(
    role: DatabaseRole = typer.Option(..., help="Role of the token's holder at Urza's API."),
) -> None:
    """Create a token for Urza's API. It is printed once; Urza's settings hold only its SHA-256."""
    from esper.services.urza.settings import token_hash

    value = secrets.token_urlsafe(TOKEN_BYTES)
    variable = f"ESPER_URZA__{role.name}_TOKENS_SHA256"
    typer.echo(f"token for the client:  {value}")
    typer.echo(f"setting for Urza:      {variable}={token_hash(value)}")
    typer.echo(f"separate several hashes in {variable} with commas; remove one to revoke its token")
