"""The `esper` command: collects every command group, and prints an error as one line."""

import importlib
import logging
import os
import sys
from pathlib import Path

import typer

from esper.config import CONFIG_VARIABLE
from esper.errors import EsperError
from esper.logging import install_crash_hooks
from esper.redaction import mask_text

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
COMMAND_MODULES = (
    "config",
    "tolaria.demo",
    "stack",
    "tolaria.train",
    "oona.topics",
    "oona.acls",
    "oona.events",
    "oona.dead_letters",
    "oona.outbox",
    "metrics",
    "schema",
    "streams.projections",
    "storage",
    "streams.roles",
    "serve",
    "blueprints",
    "tamiyo.versions",
)
"""One module a command group, in the order of `esper --help`."""

app = typer.Typer(
    name="esper",
    help="Neural networks that grow while they train, run as an event-sourced system on Kafka.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    config: Path | None = typer.Option(None, help="A YAML file with settings; ESPER_CONFIG does the same."),
) -> None:
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)


for _module in COMMAND_MODULES:
    importlib.import_module(f"esper.cli.{_module}").register(app)


def main() -> None:
    """Run the command line; an error of Esper's is one message on stderr and exit code 1. No secret is printed."""
    install_crash_hooks()
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())  # what it reports reaches us as an error
    try:
        app()
    except EsperError as error:
        print(f"esper: {mask_text(str(error))}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_ERROR)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"esper: {mask_text(f'{error.filename}: {error.strerror}')}; name another path", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        print("esper: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_INTERRUPTED)
