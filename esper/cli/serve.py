"""`esper serve urza | tamiyo`: run a service until it receives SIGTERM or SIGINT."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer

from esper.cli.command_group import add_group
from esper.config import load_settings
from esper.logging import configure_logging, get_logger

_log = get_logger(__name__)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_group(app, "serve", "Run a service in the foreground.", {"urza": urza, "tamiyo": tamiyo})


def urza() -> None:
    """Run Urza: the library of blueprints and kernels, with its HTTP API."""
    from esper.services.urza.settings import UrzaSettings, check_exposure

    settings = load_settings()
    configure_logging(settings.logging)
    urza_settings = settings.section("urza", UrzaSettings)
    check_exposure(urza_settings)  # before the import of torch, which takes seconds

    import uvicorn
    from uvicorn.loops.auto import auto_loop_factory

    from esper.embedded.processes import free_port
    from esper.services.urza.api import make_api
    from esper.services.urza.urza_service import open_urza

    port = urza_settings.port or free_port()

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Capture no signals: uvicorn would raise them again when it ends, before Urza is closed."""
            yield

    async def serve() -> bool:
        async with open_urza(settings) as opened:
            api = opened.metrics.wrap_app(make_api(opened, settings))
            server = Server(uvicorn.Config(api, host=urza_settings.host, port=port, log_config=None, access_log=False))
            _on_stop_signals(lambda: setattr(server, "should_exit", True))
            running = asyncio.create_task(server.serve())
            while not server.started and not running.done():
                await asyncio.sleep(0.05)
            if server.started:
                _log.info("urza.ready", url=f"http://{urza_settings.host}:{port}")
            await running
            return server.started

    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # uvloop if it is installed
        if not runner.run(serve()):
            raise typer.Exit(1)


def tamiyo() -> None:
    """Run Tamiyo: the controller that decides at each boundary of each run whether and where to grow."""
    from esper.services.tamiyo.decision_service import DecisionService
    from esper.services.tamiyo.settings import TamiyoSettings

    settings = load_settings()
    configure_logging(settings.logging)
    tamiyo_settings = settings.section("tamiyo", TamiyoSettings)

    async def decide() -> None:
        async with DecisionService(settings, tamiyo_settings) as service:
            deciding = asyncio.create_task(service.run())
            _on_stop_signals(deciding.cancel)
            with suppress(asyncio.CancelledError):
                await deciding

    asyncio.run(decide())


def _on_stop_signals(stop: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop)
