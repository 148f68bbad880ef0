"""Random logs of trainers and Urza, as a broker would hold them, and the state that each view must show.

``SimulatedTrainer`` keeps a trainer's rules: sequences count up over all topics, every event that a boundary names is
sent before it, the health of a window is sent before the first boundary after it, seeds move at boundaries. It is also
the test oracle: ``states_at_boundaries`` holds its own state at each boundary. ``GeneratedLog`` appends messages to
partitions and adds faults: records that cannot be decoded and are redriven later, resends, gaps between offsets.
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
from esper.oona.dead_letters.dead_letter import ORIGIN_HEADER
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
class SimulatedSeed:
    """The trainer's state of one seed; dormant at first."""

    stage: SeedStage = SeedStage.DORMANT
    since_step: int = 0
    blueprint_id: str | None = None
    germinated_at_step: int | None = None
    num_germinations: int = 0
    num_given_up: int = 0
    breaker: str = "closed"


@dataclass
class SimulatedTrainer:
    """The trainer of one run, through all its incarnations. ``send`` takes each message."""

    run_id: str
    rng: random.Random
    send: Callable[[OonaMessage], None]
    num_layers: int = 2
    incarnation: int = 0
    sequence: int = 0
    step: int = 0
    epoch: int = 0
    last_sequences: dict[str, int] = field(default_factory=dict)
    seeds: dict[tuple[str, int], SimulatedSeed] = field(default_factory=dict)
    epochs: list[tuple[int, int]] = field(default_factory=list)
    checkpoints: list[Any] = field(default_factory=list)
    windows: dict[tuple[str, int, int], list[Any]] = field(default_factory=dict)
    states_at_boundaries: dict[BoundaryKey, Any] = field(default_factory=dict)

    def emit(self, event: type[events.TrainerEvent], /, **fields: Any) -> None:
        """Send the next event of this incarnation."""
        number, self.sequence = self.sequence, self.sequence + 1
        origin = {"run_id": self.run_id, "incarnation": self.incarnation, "sequence": number, "step": self.step}
        message = OonaMessage.of(
            event(**origin, **fields), id=ids.trainer_event_id(self.run_id, self.incarnation, number), source="t"
        )
        self.last_sequences[message.registration.topic.name] = number
        self.send(message)

    def start(self) -> None:
        """Start incarnation 1."""
        names = [f"layer{n}" for n in range(self.num_layers)]
        self.incarnation = 1
        self.seeds = {(name, n): SimulatedSeed() for name in names for n in range(2)}
        self.emit(
            events.RunStarted, model="Net", boundary_steps=BOUNDARY_STEPS, command_offset=0,
            layers=tuple(LayerNode(layer_id=n, kind="linear", num_features=WIDTH, num_parameters=72, num_seeds=2) for n in names),
            edges=tuple(LayerEdge(source=a, target=b) for a, b in pairwise(names)),
            hyperparameters=self.rng.choice(({}, {"epochs": 4}, {"epochs": 2.5}, {"epochs": True})),
        )  # fmt: skip
        self.save_checkpoint(is_reported=False)

    def train(self, num_steps: int) -> None:
        """Take steps, with the health reports and the boundaries that are due on them."""
        for _n in range(num_steps):
            self.step += 1
            if self.step % HEALTH_EVERY == 0:
                self.report_health()
            if self.step % BOUNDARY_STEPS == 0:
                self.pass_boundary()

    def report_health(self) -> None:
        """Send one report a layer; 15 % of them are lost."""
        for layer_id in dict.fromkeys(name for name, _n in self.seeds):
            if self.rng.random() < 0.15:
                continue
            signals = tuple(self.draw_signal(layer_id, n) for n in range(2))
            self.emit(events.LayerHealthMeasured, epoch=self.epoch, layer_id=layer_id, signals=signals)

    def draw_signal(self, layer_id: str, seed_id: int) -> HealthSignal:
        """A random signal; it is added to the trainer's own sums of the window."""
        mean = self.draw_number()
        signal = HealthSignal(
            layer_id=layer_id, seed_id=seed_id, chunk_id=seed_id, epoch=self.epoch, activation_mean=mean,
            health_score=self.rng.random() if mean is None or isfinite(mean) else 0.0, dead_ratio=self.rng.random(),
        )  # fmt: skip
        key = (layer_id, seed_id, self.step - self.step % WINDOW_STEPS)
        add_signal(self.windows.setdefault(key, new_sums()), signal)
        return signal

    def draw_number(self) -> float | None:
        """A random statistic: null, an extreme number, or one near 0."""
        return self.rng.choice((*ODD_NUMBERS, None)) if self.rng.random() < 0.3 else self.rng.gauss(0, 3)

    def pass_boundary(self) -> None:
        """Move seeds, change breakers and reject commands at random, then send the boundary."""
        for (layer_id, n), seed in self.seeds.items():
            seed_key = {"layer_id": layer_id, "seed_id": n}
            if self.rng.random() < 0.4:
                self.move(seed, **seed_key)
            if self.rng.random() < 0.1:
                before, seed.breaker = seed.breaker, self.rng.choice(("closed", "open", "half_open"))
                self.emit(
                    events.BreakerChanged, from_state=before, to_state=seed.breaker, num_failures=self.rng.randrange(4), **seed_key
                )  # fmt: skip
            if self.rng.random() < 0.1:
                command = ids.command_id(ids.decision_id(self.run_id, self.incarnation, self.sequence + 1))
                self.emit(events.CommandRejected, command_id=command, reason="expired", **seed_key)
        number = self.step // BOUNDARY_STEPS
        self.emit(events.BoundaryReached, boundary=number, epoch=self.epoch, last_sequences=dict(self.last_sequences))
        newest = last_complete_window(self.step)
        health = {key: HealthWindow(tuple(self.windows.get((*key, newest), new_sums()))) for key in self.seeds}
        self.states_at_boundaries[self.run_id, self.incarnation, number] = (
            deepcopy(self.seeds),
            tuple(self.epochs),
            health,
        )

    def move(self, seed: SimulatedSeed, **seed_key: Any) -> None:
        """Send one random transition that the lifecycle allows."""
        before, seed.since_step = seed.stage, self.step
        seed.stage = self.rng.choice(sorted(TRANSITIONS[before]))
        if seed.stage is SeedStage.GERMINATED:
            seed.blueprint_id, seed.germinated_at_step = self.rng.choice(BLUEPRINTS), self.step
            seed.num_germinations += 1
        seed.num_given_up += seed.stage in EMBARGO_STAGES
        if seed.stage is SeedStage.DORMANT:
            seed.blueprint_id = None
        self.emit(
            events.SeedTransitioned, from_stage=before, to_stage=seed.stage, reason="schedule",
            blueprint_id=seed.blueprint_id, num_parameters=16 if seed.blueprint_id else 0, **seed_key,
        )  # fmt: skip

    def end_epoch(self) -> None:
        """Send the metrics of the epoch and begin the next one."""
        metrics = {"val_accuracy": self.rng.random(), "loss": self.rng.choice((None, 1e308, -1e308, 0.5))}
        self.epochs.append((self.epoch, self.step))
        self.emit(events.EpochCompleted, epoch=self.epoch, metrics=metrics)
        self.epoch += 1

    def report_gap(self) -> None:
        """Report missing telemetry."""
        self.emit(
            events.TelemetryGap, from_step=max(0, self.step - self.rng.randrange(40)), num_lost=self.rng.randint(1, 9)
        )

    def save_checkpoint(self, *, is_reported: bool = True) -> None:
        """Keep the state to resume from, and report it if ``is_reported``."""
        self.checkpoints.append(deepcopy((self.step, self.epoch, self.seeds, self.epochs)))
        if is_reported:
            self.emit(events.CheckpointSaved, epoch=self.epoch, sha256="ab" * 32, size_bytes=9, command_offset=0)

    def resume(self) -> "SimulatedTrainer":
        """Resume from a checkpoint as the next incarnation; returns the superseded one, which may still send."""
        zombie = SimulatedTrainer(**{**vars(self), "states_at_boundaries": {}, "checkpoints": []})
        zombie.seeds, zombie.epochs = deepcopy((self.seeds, self.epochs))
        zombie.last_sequences, zombie.windows, self.windows = dict(self.last_sequences), self.windows, {}
        self.checkpoints = self.checkpoints[: self.rng.randint(1, len(self.checkpoints))]
        self.step, self.epoch, self.seeds, self.epochs = deepcopy(self.checkpoints[-1])
        self.incarnation, self.sequence, self.last_sequences = self.incarnation + 1, 0, {}
        for seed in self.seeds.values():
            seed.breaker = "closed"
        self.emit(
            events.RunResumed, from_incarnation=self.incarnation - 1, epoch=self.epoch, command_offset=0,
            seeds=tuple(
                Seed(layer_id=name, seed_id=n, stage=s.stage, stage_since_step=s.since_step, blueprint_id=s.blueprint_id)
                for (name, n), s in self.seeds.items() if s.stage is not SeedStage.DORMANT
            ),
        )  # fmt: skip
        return zombie

    def act(self, action: str) -> None:
        """Carry out one action of a script; an unknown action trains."""
        match action:
            case "epoch":
                self.end_epoch()
            case "gap":
                self.report_gap()
            case "save":
                self.save_checkpoint()
            case "resume":
                zombie = self.resume()
                if self.rng.random() < 0.5:
                    self.train(self.rng.randrange(20))
                    zombie.train(self.rng.randrange(20))
                    zombie.end_epoch()
            case _:
                self.train(self.rng.randint(1, 24))


def library_messages(rng: random.Random) -> Iterator[OonaMessage]:
    """Blueprints and kernels in random order: some certified, some retired, some kernels registered twice."""
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


class GeneratedLog:
    """Partitions of records as a broker holds them. ``has_undecodable``: some record cannot be decoded."""

    def __init__(self, rng: random.Random, share_broken: float, share_resent: float) -> None:
        self.partitions: dict[TopicPartition, list[StoredRecord]] = {}
        self.has_undecodable = False
        self._rng = rng
        self.share_broken, self.share_resent = share_broken, share_resent
        self._sent: dict[TopicPartition, list[OonaMessage]] = {}
        self._undecodable: list[tuple[TopicPartition, Position, OonaMessage]] = []

    def add(self, message: OonaMessage) -> None:
        """Append a message; corrupt it, resend earlier ones or redrive at random."""
        topic = message.registration.topic
        partition = (
            topic.name,
            partition_for(message.registration.key_of(message.data).encode(), topic.num_partitions),
        )
        self._sent.setdefault(partition, []).append(message)
        is_broken = self._rng.random() < self.share_broken
        position = self._append(partition, message, is_broken=is_broken)
        if is_broken:
            self.has_undecodable = True
            self._undecodable.append((partition, position, message))
        if self._rng.random() < self.share_resent:
            for resent in self._sent[partition][-self._rng.randint(1, 4) :]:
                self._append(partition, resent)
        if self._undecodable and self._rng.random() < 0.1:
            self.redrive()

    def redrive(self) -> None:
        """Append corrupted messages again, intact, in random order; a later call may repeat them."""
        for partition, origin, message in self._rng.sample(
            self._undecodable, self._rng.randint(0, len(self._undecodable))
        ):
            self._append(partition, message, origin=origin)

    def _append(
        self,
        partition: TopicPartition,
        message: OonaMessage,
        *,
        is_broken: bool = False,
        origin: Position | None = None,
    ) -> Position:
        records = self.partitions.setdefault(partition, [])
        offset = records[-1].position.offset + self._rng.choice((1, 1, 1, 3)) if records else self._rng.randrange(3)
        record = encode(message)
        headers, value = record.headers, record.value
        if origin is not None:
            headers = (*headers, (ORIGIN_HEADER, f"{origin.topic}/{origin.partition}/{origin.offset}".encode()))
        if is_broken:
            value = b"\x00"
        position = Position(*partition, offset)
        records.append(StoredRecord(position, record.key, value, headers, 1_700_000_000_000 + 60_000 * offset))
        return position


def generate_log(
    seed: int, scripts: list[list[str]], share_broken: float, share_resent: float
) -> tuple[GeneratedLog, dict[BoundaryKey, Any]]:
    """Run trainers side by side, each by its script; returns the log and each trainer's state at its boundaries."""
    rng = random.Random(seed)
    log = GeneratedLog(rng, share_broken, share_resent)
    trainers = [SimulatedTrainer(f"run{n}", rng, log.add) for n in range(len(scripts))]
    library = list(library_messages(rng))
    for trainer in trainers:
        trainer.start()
    remaining = [list(script) for script in scripts]
    while any(remaining):
        number = rng.choice([n for n, script in enumerate(remaining) if script])
        trainers[number].act(remaining[number].pop(0))
        for _n in range(min(len(library), rng.randrange(4))):
            log.add(library.pop(0))
    for message in library:
        log.add(message)
    log.redrive()
    return log, {key: state for trainer in trainers for key, state in trainer.states_at_boundaries.items()}
