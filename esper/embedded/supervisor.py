"""The process behind ``esper up``: runs the embedded stack until SIGTERM or SIGINT.

It writes stack.json, which only its owner can read, when all services are ready, and deletes it at
the end. Run it as ``python -m esper.embedded.supervisor STATE_FOLDER DATA_FOLDER``.
"""

import json
import os
import signal
import sys
from pathlib import Path

from esper.config import STACK_FILE
from esper.embedded.stack import EmbeddedStack
from esper.errors import EsperError


def main() -> int:
    """Run the stack until SIGTERM or SIGINT; returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    state, data = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        with EmbeddedStack(data, report=print) as stack:
            write_stack_file(state, stack)
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
            (state / STACK_FILE).unlink(missing_ok=True)
    except EsperError as error:
        print(f"esper: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def write_stack_file(state: Path, stack: EmbeddedStack) -> None:
    """Write the addresses of the services and this process's id to stack.json, atomically."""
    described = {
        **stack.sections(),
        "supervisor_pid": os.getpid(),
        "parts": {
            type(part).__name__.removeprefix("Embedded"): {
                "pid": part.pid,
                "address": f"127.0.0.1:{part.port}",
                "log": str(part.log_path),
            }
            for part in stack.parts
        },
    }
    partial = state / f".{STACK_FILE}"
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(described, indent=2), encoding="utf-8")
    partial.replace(state / STACK_FILE)


if __name__ == "__main__":
    sys.exit(main())
