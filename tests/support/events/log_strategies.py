"""Stories: what trainers and Urza could tell, as the log would hold it. Drawn by hypothesis.

``Trainer`` keeps a trainer's rules: sequences count up over all topics, everything that a boundary names was sent
before it, health of a window is told before the first boundary after it, moves happen at boundaries. It is also the
oracle: ``seen`` has what it knew itself at each boundary. ``Log`` lays messages into partitions, and can spoil that:
records that cannot be decoded, redriven later; resends; offsets that hold no record.
"""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any

from support.data.reference_health_windows import HealthWindow

from esper.graph.health_windows import WINDOW_STEPS, add_signal, last_complete_window, new_sums
from esper.oona.cloudevents import encode
from esper.oona.dead_letters.dead_letter import ORIGIN
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position, TopicPartition, partition_for
from esper.schemas import events, ids
from esper.schemas.assets import BlueprintSpec, Kernel, LayerEdge, LayerNode, Seed
from esper.schemas.enums import BlueprintChange, SeedStage
from esper.schemas.lifecycle import EMBARGO_STAGES, TRANSITIONS
from esper.schemas.messages import OonaMessage
from esper.schemas.operational import HealthSignal

BOUNDARY_STEPS, HEALTH_EVERY = 7, 6
WIDTH = 8
BLUEPRINTS = ("affine", "norm", "thin")
ODD_NUMBERS = (0.0, -0.0, 1e308, -1e308, 5e-324, float("nan"), 0.1, -3.5)
BoundaryKey = tuple[str, int, int]


@dataclass
class Asleep:
    """One seed, as the trainer has it."""

    stage: SeedStage = SeedStage.DORMANT
    since_step: int = 0
    blueprint_id: str | None = None
    germinated_at_step: int | None = None
    num_germinations: int = 0
    num_given_up: int = 0
    breaker: str = "closed"


@dataclass
class Trainer:
    """One run, incarnation after incarnation."""

    run_id: str
    rng: random.Random
    tell: Callable[[OonaMessage], None]
    num_layers: int = 2
    incarnation: int = 0
    sequence: int = 0
    step: int = 0
    epoch: int = 0
    last_sequences: dict[str, int] = field(default_factory=dict)
    seeds: dict[tuple[str, int], Asleep] = field(default_factory=dict)
    epochs: list[tuple[int, int]] = field(default_factory=list)
    saved: list[Any] = field(default_factory=list)
    windows: dict[tuple[str, int, int], list[Any]] = field(default_factory=dict)
    seen: dict[BoundaryKey, Any] = field(default_factory=dict)

    def say(self, event: type[events.TrainerEvent], /, **fields: Any) -> None:
        """The next event of this incarnation."""
        number, self.sequence = self.sequence, self.sequence + 1
        place = {"run_id": self.run_id, "incarnation": self.incarnation, "sequence": number, "step": self.step}
        message = OonaMessage.of(
            event(**place, **fields), id=ids.trainer_event_id(self.run_id, self.incarnation, number), source="t"
        )
        self.last_sequences[message.registration.topic.name] = number
        self.tell(message)

    def start(self) -> None:
        """Incarnation 1."""
        names = [f"layer{n}" for n in range(self.num_layers)]
        self.incarnation = 1
        self.seeds = {(name, n): Asleep() for name in names for n in range(2)}
        self.say(
            events.RunStarted, model="Net", boundary_steps=BOUNDARY_STEPS, command_offset=0,
            layers=tuple(LayerNode(layer_id=n, kind="linear", num_features=WIDTH, num_parameters=72, num_seeds=2) for n in names),
            edges=tuple(LayerEdge(source=a, target=b) for a, b in pairwise(names)),
            hyperparameters=self.rng.choice(({}, {"epochs": 4}, {"epochs": 2.5}, {"epochs": True})),
        )  # fmt: skip
        self.save(is_told=False)

    def train(self, num_steps: int) -> None:
        """Steps, with the health and the boundaries that fall on them."""
        for _n in range(num_steps):
            self.step += 1
            if self.step % HEALTH_EVERY == 0:
                self.tell_health()
            if self.step % BOUNDARY_STEPS == 0:
                self.pass_boundary()

    def tell_health(self) -> None:
        """One report a layer; now and then one is lost."""
        for layer_id in dict.fromkeys(name for name, _n in self.seeds):
            if self.rng.random() < 0.15:
                continue
            signals = tuple(self.signal(layer_id, n) for n in range(2))
            self.say(events.LayerHealthMeasured, epoch=self.epoch, layer_id=layer_id, signals=signals)

    def signal(self, layer_id: str, seed_id: int) -> HealthSignal:
        """Any signal, added to what the trainer knows of the window."""
        mean = self.number()
        signal = HealthSignal(
            layer_id=layer_id, seed_id=seed_id, chunk_id=seed_id, epoch=self.epoch, activation_mean=mean,
            health_score=self.rng.random() if mean is None or isfinite(mean) else 0.0, dead_ratio=self.rng.random(),
        )  # fmt: skip
        key = (layer_id, seed_id, self.step - self.step % WINDOW_STEPS)
        add_signal(self.windows.setdefault(key, new_sums()), signal)
        return signal

    def number(self) -> float | None:
        """Any statistic."""
        return self.rng.choice((*ODD_NUMBERS, None)) if self.rng.random() < 0.3 else self.rng.gauss(0, 3)

    def pass_boundary(self) -> None:
        """Seeds move, breakers open, commands are refused; then the boundary."""
        for (layer_id, n), seed in self.seeds.items():
            place = {"layer_id": layer_id, "seed_id": n}
            if self.rng.random() < 0.4:
                self.move(seed, **place)
            if self.rng.random() < 0.1:
                before, seed.breaker = seed.breaker, self.rng.choice(("closed", "open", "half_open"))
                self.say(
                    events.BreakerChanged, from_state=before, to_state=seed.breaker, num_failures=self.rng.randrange(4), **place
                )  # fmt: skip
            if self.rng.random() < 0.1:
                command = ids.command_id(ids.decision_id(self.run_id, self.incarnation, self.sequence + 1))
                self.say(events.CommandRejected, command_id=command, reason="expired", **place)
        number = self.step // BOUNDARY_STEPS
        self.say(events.BoundaryReached, boundary=number, epoch=self.epoch, last_sequences=dict(self.last_sequences))
        newest = last_complete_window(self.step)
        health = {place: HealthWindow(tuple(self.windows.get((*place, newest), new_sums()))) for place in self.seeds}
        self.seen[self.run_id, self.incarnation, number] = (deepcopy(self.seeds), tuple(self.epochs), health)

    def move(self, seed: Asleep, **place: Any) -> None:
        """One allowed transition."""
        before, seed.since_step = seed.stage, self.step
        seed.stage = self.rng.choice(sorted(TRANSITIONS[before]))
        if seed.stage is SeedStage.GERMINATED:
            seed.blueprint_id, seed.germinated_at_step = self.rng.choice(BLUEPRINTS), self.step
            seed.num_germinations += 1
        seed.num_given_up += seed.stage in EMBARGO_STAGES
        if seed.stage is SeedStage.DORMANT:
            seed.blueprint_id = None
        self.say(
            events.SeedTransitioned, from_stage=before, to_stage=seed.stage, reason="schedule",
            blueprint_id=seed.blueprint_id, num_parameters=16 if seed.blueprint_id else 0, **place,
        )  # fmt: skip

    def end_epoch(self) -> None:
        """Metrics."""
        metrics = {"val_accuracy": self.rng.random(), "loss": self.rng.choice((None, 1e308, -1e308, 0.5))}
        self.epochs.append((self.epoch, self.step))
        self.say(events.EpochCompleted, epoch=self.epoch, metrics=metrics)
        self.epoch += 1

    def lose(self) -> None:
        """Telemetry that is missing."""
        self.say(
            events.TelemetryGap, from_step=max(0, self.step - self.rng.randrange(40)), num_lost=self.rng.randint(1, 9)
        )

    def save(self, *, is_told: bool = True) -> None:
        """A checkpoint."""
        self.saved.append(deepcopy((self.step, self.epoch, self.seeds, self.epochs)))
        if is_told:
            self.say(events.CheckpointSaved, epoch=self.epoch, sha256="ab" * 32, size_bytes=9, command_offset=0)

    def resume(self) -> "Trainer":
        """A new incarnation goes on from a checkpoint; gives the old one, which may not know that it is dead."""
        zombie = Trainer(**{**vars(self), "seen": {}, "saved": []})
        zombie.seeds, zombie.epochs = deepcopy((self.seeds, self.epochs))
        zombie.last_sequences, zombie.windows, self.windows = dict(self.last_sequences), self.windows, {}
        self.saved = self.saved[: self.rng.randint(1, len(self.saved))]
        self.step, self.epoch, self.seeds, self.epochs = deepcopy(self.saved[-1])
        self.incarnation, self.sequence, self.last_sequences = self.incarnation + 1, 0, {}
        for seed in self.seeds.values():
            seed.breaker = "closed"
        self.say(
            events.RunResumed, from_incarnation=self.incarnation - 1, epoch=self.epoch, command_offset=0,
            seeds=tuple(
                Seed(layer_id=name, seed_id=n, stage=s.stage, stage_since_step=s.since_step, blueprint_id=s.blueprint_id)
                for (name, n), s in self.seeds.items() if s.stage is not SeedStage.DORMANT
            ),
        )  # fmt: skip
        return zombie

    def act(self, action: str) -> None:
        """One thing out of a story."""
        match action:
            case "epoch":
                self.end_epoch()
            case "gap":
                self.lose()
            case "save":
                self.save()
            case "resume":
                zombie = self.resume()
                if self.rng.random() < 0.5:
                    self.train(self.rng.randrange(20))
                    zombie.train(self.rng.randrange(20))
                    zombie.end_epoch()
            case _:
                self.train(self.rng.randint(1, 24))


def library(rng: random.Random) -> Iterator[OonaMessage]:
    """Blueprints and kernels: some certified, some retired again, some kernels twice, one of a blueprint nobody has."""
    for blueprint_id in rng.sample(BLUEPRINTS, len(BLUEPRINTS)):
        changes = (BlueprintChange.PROPOSE, BlueprintChange.COMPILE, BlueprintChange.CERTIFY, BlueprintChange.RETIRE)
        for version, change in enumerate(changes[: rng.choice((2, 3, 3, 3, 4))]):
            spec = BlueprintSpec(module="affine", targets=("linear",)) if version == 0 else None
            event = events.BlueprintChangeRequested(
                blueprint_id=blueprint_id, change=change, expected_version=version, spec=spec
            )
            yield OonaMessage.of(event, id=ids.request_id(f"{blueprint_id}{version}"), source="t")
            if rng.random() < 0.6:
                sha256 = f"{rng.choice('ab')}{rng.choice('cd')}" * 32
                kernel = Kernel(
                    kernel_sha256=sha256, blueprint_id=blueprint_id, blueprint_version=max(1, version), target="linear",
                    num_features=rng.choice((WIDTH, WIDTH, 9)), num_parameters=16, size_bytes=rng.randint(1, 99),
                )  # fmt: skip
                registered = events.KernelRegistered(blueprint_id=blueprint_id, kernel=kernel)
                yield OonaMessage.of(registered, id=ids.kernel_event_id(sha256), source="t")


class Log:
    """Partitions of records, as a broker would hold them. ``is_spoilt`` once a record could not be decoded."""

    def __init__(self, rng: random.Random, share_broken: float, share_resent: float) -> None:
        self.partitions: dict[TopicPartition, list[StoredRecord]] = {}
        self.is_spoilt = False
        self._rng = rng
        self.share_broken, self.share_resent = share_broken, share_resent
        self._sent: dict[TopicPartition, list[OonaMessage]] = {}
        self._letters: list[tuple[TopicPartition, Position, OonaMessage]] = []

    def add(self, message: OonaMessage) -> None:
        """Append a message; spoil now and then."""
        topic = message.registration.topic
        place = (topic.name, partition_for(message.registration.key_of(message.data).encode(), topic.num_partitions))
        self._sent.setdefault(place, []).append(message)
        is_broken = self._rng.random() < self.share_broken
        position = self._append(place, message, is_broken=is_broken)
        if is_broken:
            self.is_spoilt = True
            self._letters.append((place, position, message))
        if self._rng.random() < self.share_resent:
            for resent in self._sent[place][-self._rng.randint(1, 4) :]:
                self._append(place, resent)
        if self._letters and self._rng.random() < 0.1:
            self.redrive()

    def redrive(self) -> None:
        """Send letters again, in any order, some of them twice."""
        for place, origin, message in self._rng.sample(self._letters, self._rng.randint(0, len(self._letters))):
            self._append(place, message, origin=origin)

    def _append(
        self, place: TopicPartition, message: OonaMessage, *, is_broken: bool = False, origin: Position | None = None
    ) -> Position:
        records = self.partitions.setdefault(place, [])
        offset = records[-1].position.offset + self._rng.choice((1, 1, 1, 3)) if records else self._rng.randrange(3)
        record = encode(message)
        headers, value = record.headers, record.value
        if origin is not None:
            headers = (*headers, (ORIGIN, f"{origin.topic}/{origin.partition}/{origin.offset}".encode()))
        if is_broken:
            value = b"\x00"
        position = Position(*place, offset)
        records.append(StoredRecord(position, record.key, value, headers, 1_700_000_000_000 + 60_000 * offset))
        return position


def tell_story(
    seed: int, scripts: list[list[str]], share_broken: float, share_resent: float
) -> tuple[Log, dict[BoundaryKey, Any]]:
    """Runs side by side, each acting out its script; gives the log and what the trainers knew at their boundaries."""
    rng = random.Random(seed)
    log = Log(rng, share_broken, share_resent)
    trainers = [Trainer(f"run{n}", rng, log.add) for n in range(len(scripts))]
    shelf = list(library(rng))
    for trainer in trainers:
        trainer.start()
    waiting = [list(script) for script in scripts]
    while any(waiting):
        number = rng.choice([n for n, script in enumerate(waiting) if script])
        trainers[number].act(waiting[number].pop(0))
        for _n in range(min(len(shelf), rng.randrange(4))):
            log.add(shelf.pop(0))
    for message in shelf:
        log.add(message)
    log.redrive()
    return log, {key: known for trainer in trainers for key, known in trainer.seen.items()}
