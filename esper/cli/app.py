"""The `esper` command: collects every command group, and prints an error as one line."""

import importlib
import logging
import os
import sys
from pathlib import Path

import typer

from esper.cli.terminal import EXIT_ERROR, EXIT_INTERRUPTED, print_error
from esper.config import CONFIG_VARIABLE
from esper.errors import EsperError
from esper.logging import install_crash_hooks

COMMAND_MODULES = {
    "Getting started": ("tolaria.demo", "stack", "tolaria.train"),
    "Growth": ("streams.seed_causes", "urza.blueprints", "tamiyo.versions"),
    "Services and data": ("serve", "config", "streams.projections", "storage", "streams.roles"),
    "Kafka": ("oona.topics", "oona.events", "oona.dead_letters", "oona.outbox", "oona.acls"),
    "Reference": ("schema", "metrics"),
}
"""One module for each command or group of commands, by the heading that `esper --help` lists it under."""

app = typer.Typer(
    name="esper",
    help="Train neural networks that grow while they train.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    config: Path | None = typer.Option(None, help="YAML file with settings. `ESPER_CONFIG` sets it too."),
) -> None:
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)


def _register_commands() -> None:
    for heading, modules in COMMAND_MODULES.items():
        for module in modules:
            num_commands, num_groups = len(app.registered_commands), len(app.registered_groups)
            importlib.import_module(f"esper.cli.{module}").register(app)
            for command in app.registered_commands[num_commands:]:
                command.rich_help_panel = heading
            for group in app.registered_groups[num_groups:]:
                group.rich_help_panel = heading


_register_commands()


def main() -> None:
    """Run the command line. An ``EsperError`` becomes a message on stderr, with secrets masked, and exit code 1."""
    install_crash_hooks()
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())  # its failures are also raised, and printed once
    try:
        app()
    except EsperError as error:
        print_error(str(error))
        sys.exit(EXIT_ERROR)
    except OSError as error:
        if error.filename is None:
            raise
        print_error(f"{error.filename}: {error.strerror}; choose another path")
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(EXIT_INTERRUPTED)
