"""The orchestrator waits for each service, whatever earlier processes wrote to its log."""

import sys
from pathlib import Path

import pytest

from esper.errors import UnavailableError
from esper.services.tolaria.orchestrator import Orchestrator, ServiceSpec

READY = "import time; time.sleep(0.2); print('is ready', flush=True); time.sleep(60)"


def service(name: str, program: str) -> ServiceSpec:
    return ServiceSpec(name, (sys.executable, "-c", program), "is ready")


def test_orchestrator_starts_services_in_order(tmp_path: Path) -> None:
    (tmp_path / "first.log").write_text("is ready\n")  # of an earlier process
    reports: list[str] = []
    with Orchestrator((service("first", READY), service("second", READY)), {}, tmp_path, reports.append) as running:
        assert (tmp_path / "first.log").read_text().count("is ready") == 2
        assert [(h.name, h.is_alive, h.num_restarts) for h in running.health()] == [
            ("first", True, 0),
            ("second", True, 0),
        ]
    assert reports == ["starting first", "starting second"]
    assert not any(h.is_alive for h in running.health())


def test_failed_start_stops_the_services_before(tmp_path: Path) -> None:
    orchestrator = Orchestrator((service("first", READY), service("broken", "raise SystemExit('no')")), {}, tmp_path)
    with pytest.raises(UnavailableError, match="broken exited with 1 while starting"), orchestrator:
        pass
    assert not any(h.is_alive for h in orchestrator.health())
