"""Signals that reach the host late are reported with their own step, before the views that read them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper.connection.events.health_reporter import HealthReporter
from esper.connection.events.journal import Journal
from esper.connection.events.telemetry_queue import TelemetryQueue
from esper.connection.settings import LinkOptions
from esper.kasmina import readings
from esper.oona.outbox.outbox_store import Outbox

BOUNDARY_STEPS, EVERY_STEPS = 50, 10


class TrainingLoop:
    """Steps of a model whose numbers reach the host only when ``is_done`` says so."""

    def __init__(self, folder: Path) -> None:
        self.model = esper.wrap(nn.Linear(4, 4), seeds_per_layer=2)
        self.queue = TelemetryQueue(Outbox(folder / "spill.sqlite"), LinkOptions.model_validate({}))
        journal = Journal("run", 1, Outbox(folder / "outbox.sqlite"))
        self.reporter = HealthReporter(self.model, journal, self.queue, EVERY_STEPS)
        self.step = 0

    def to(self, step: int) -> list[int]:
        """Train up to a step; returns the steps whose signals were reported so far."""
        while self.step < step:
            self.reporter.begin_step(self.step + 1)
            self.model(torch.ones(2, 4)).sum().backward()
            self.step += 1
            self.reporter.end_step(self.step, 0, is_boundary=self.step % BOUNDARY_STEPS == 0)
        return self.reported_steps

    @property
    def reported_steps(self) -> list[int]:
        return [message.data.step for message in self.queue._queue]


def test_reporter_sends_late_signals_before_their_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, is_done = TrainingLoop(tmp_path), False
    monkeypatch.setattr(readings.Reading, "is_done", property(lambda _self: is_done))
    assert training.to(49) == []
    assert training.to(50) == [10, 20, 30, 40]  # the newest whole window ends at 47: step 50 may come later
    assert training.to(59) == [10, 20, 30, 40]
    is_done = True
    assert training.to(60) == [10, 20, 30, 40, 50, 60]
    is_done = False
    training.to(71)
    training.reporter.report_pending()
    assert training.reported_steps[-1] == 70
    assert [message.data.sequence for message in training.queue._queue] == list(range(7))


def test_reporter_counts_signals_lost_by_a_broken_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingLoop(tmp_path)
    monkeypatch.setattr(readings.Reading, "is_done", property(lambda _self: False))

    def broken(_self: readings.Reading) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(readings.Reading, "chunks", broken)
    training.to(29)
    training.reporter.begin_step(30)
    training.reporter.stop()
    assert not training.model.probe.is_armed
    assert training.queue.take_lost() == 2
    assert training.reported_steps == []
