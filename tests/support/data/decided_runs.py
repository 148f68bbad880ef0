"""Random runs with decisions as the log would hold them, with all kinds of faults, and the expected experiences.

``generate_run`` gives the messages of a run by topic, in order, and the expected result of each boundary. ``lay_out``
writes any number of runs into partitions: in any order that keeps each run's own, with duplicates and gaps of offsets.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from esper.graph.graph_view import NO_HEALTH, EpochView, GraphView, KernelView, LayerView, SeedView
from esper.graph.view_features import VIEW_VERSION
from esper.oona.cloudevents import encode
from esper.oona.log_reader import StoredRecord
from esper.oona.records import Position, TopicPartition, partition_for
from esper.schemas import events, ids
from esper.schemas.enums import Action, LayerKind, SeedStage
from esper.schemas.messages import OonaMessage
from esper.services.tamiyo.control.legal_choices import Choice, legal_choices
from esper.services.tamiyo.control.recorded_view import pack_view
from esper.services.tamiyo.dataset.experiences import Key
from esper.services.tamiyo.policies import EpsilonSoft
from esper.services.tamiyo.policies.baselines import RandomPolicy
from esper.services.tamiyo.settings import RentSettings

STEPS = 10
FATES = (
    "whole", "whole", "whole", "stale", "no_chance", "no_view", "view_differs", "view_damaged", "wrong_view", "not_legal",
    "wrong_report", "no_metric", "refused", "placebo", "before_after", "no_report", "no_decision",
)  # fmt: skip
RENT = RentSettings(parameters=0.25, flops=0.5)
FORK = events.ForkedPair(
    horizon_steps=100, num_draws=2, variance=0.0625, num_parameters_host=128, flops_added=32, flops_host=256
)
KERNELS = tuple(
    KernelView(name, 3, "ab" * 32, 10, LayerKind.LINEAR, 8, size) for name, size in (("affine", 16), ("mlp", 900))
)


@dataclass
class Story:
    """The messages of a run. ``expected`` has for each boundary choice, probability and reward, or the exclusion reason."""

    messages: dict[str, list[OonaMessage]] = field(default_factory=dict)
    expected: dict[Key, Any] = field(default_factory=dict)
    rivals: dict[Key, int] = field(default_factory=dict)
    orphans: int = 0
    wrong_reports: int = 0
    sequence: int = -1

    def add(self, event: events.Event, id: UUID) -> None:
        message = OonaMessage.of(event, id=id, source="test")
        self.messages.setdefault(message.registration.topic.name, []).append(message)


def a_view(rng: random.Random, key: Key) -> GraphView:
    """A view of two layers with two seeds each, in random stages."""
    run_id, incarnation, boundary = key
    layers = tuple(LayerView(name, LayerKind.LINEAR, 8, 72, 2, NO_HEALTH, None) for name in ("a", "b"))
    seeds = []
    for name in ("a", "b"):
        for n in range(2):
            stage = rng.choice((SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.EVALUATING))
            grown = None if stage is SeedStage.DORMANT else "affine"
            seeds.append(SeedView(name, n, stage, 1, grown, 16 if grown else 0, None, NO_HEALTH))
    epochs = tuple(EpochView(n, n * STEPS, {"val_accuracy": rng.random()}) for n in range(rng.randrange(4)))
    return GraphView(
        run_id, incarnation, boundary, boundary * STEPS, 0, layers, (("a", "b"),), tuple(seeds), epochs, KERNELS
    )


def recorded(view: GraphView, **changed: Any) -> events.ViewRecorded:
    fields: dict[str, Any] = {
        "run_id": view.run_id, "incarnation": view.incarnation, "boundary": view.boundary, "view_version": VIEW_VERSION,
        "digest": view.digest, "view_zstd": pack_view(view),
    }  # fmt: skip
    return events.ViewRecorded(**{**fields, **changed})


def decided(view: GraphView, choice: Choice, probability: float, **changed: Any) -> events.DecisionMade:
    seed, kernel = choice.seed, choice.kernel
    fields: dict[str, Any] = {
        "run_id": view.run_id, "incarnation": view.incarnation, "boundary": view.boundary, "step": view.step,
        "action": choice.action, "layer_id": seed.layer_id if seed else None, "seed_id": seed.seed_id if seed else None,
        "blueprint_id": kernel.blueprint_id if kernel else None, "probability": probability, "policy_id": "random",
        "policy_version": 1, "reason": "test", "view_digest": view.digest,
    }  # fmt: skip
    return events.DecisionMade(**{**fields, **changed})


def reported(story: Story, key: Key, choice: Choice, decision_id: UUID, **changed: Any) -> None:
    """Add a field report, by default of a fork."""
    assert choice.seed is not None
    story.sequence += 1
    fields: dict[str, Any] = {
        "run_id": key[0], "incarnation": key[1], "sequence": story.sequence, "step": key[2] * STEPS + 5,
        "layer_id": choice.seed.layer_id, "seed_id": choice.seed.seed_id, "outcome": "fossilized",
        "blueprint_id": choice.kernel.blueprint_id if choice.kernel else choice.seed.blueprint_id,
        "decision_id": decision_id, "command_id": ids.command_id(decision_id), "method": "fork", "metric": "val_accuracy",
        "before": 0.5, "after": 0.5, "germinated_at_step": 1, "num_parameters": 16,
    }  # fmt: skip
    fields = {"fork": FORK if changed.get("method", "fork") == "fork" else None, **fields, **changed}
    event = events.FieldReported(**fields)
    story.add(event, ids.trainer_event_id(key[0], key[1], story.sequence))


def generate_run(run_id: str, rng: random.Random, num_boundaries: int) -> Story:
    """Generate one run; each boundary has a random fate."""
    story = Story()
    for boundary in range(1, num_boundaries + 1):
        _add_boundary(story, (run_id, 1 + (boundary > 3), boundary), rng, rng.choice(FATES))
    return story


def _add_boundary(story: Story, key: Key, rng: random.Random, fate: str) -> None:
    view, decision_id = a_view(rng, key), ids.decision_id(*key)
    choices, policy = legal_choices(view), RandomPolicy()
    probabilities = EpsilonSoft(policy, 0.1, 0).soften(policy.distribution(view, choices), len(choices))
    index = rng.randrange(1, len(choices)) if fate not in ("whole", "stale") else rng.randrange(len(choices))
    choice = choices[index]
    if fate == "no_decision":
        reported(story, key, choice, decision_id)
        story.orphans += 1
        return
    rivals = [a_view(rng, key) for _n in range(rng.choice((0, 0, 1, 2)))]
    story.rivals[key] = len(rivals)
    _add_view(story, key, view, rng, fate)
    match fate:
        case "stale":
            event = decided(view, legal_choices(view)[0], 1.0, view_digest=None, stale=True)
        case "no_chance":
            event = decided(view, legal_choices(view)[0], 1.0)
        case "not_legal":
            event = decided(view, choice, 0.1, action=Action.CULL, layer_id="elsewhere", seed_id=0, blueprint_id=None)
        case _:
            event = decided(view, choice, probabilities[index])
    story.add(event, decision_id)
    for n, rival in enumerate(rivals):
        story.add(recorded(rival), ids.view_id(*key))
        story.add(decided(rival, legal_choices(rival)[0], 0.25, reason=f"rival {n}"), decision_id)
    story.expected[key] = _add_outcome(story, key, rng, fate, choice, (index, event.probability))


def _add_view(story: Story, key: Key, view: GraphView, rng: random.Random, fate: str) -> None:
    other = replace(view, epoch=view.epoch + 1)
    match fate:
        case "no_view" if story.rivals[key] == 0:
            return
        case "no_view" | "view_differs":
            event = recorded(other)
        case "view_damaged":
            event = recorded(other, digest=view.digest)
        case "wrong_view":
            elsewhere = replace(view, step=view.step + 1)
            event = recorded(elsewhere, digest=view.digest)
        case _:
            event = recorded(view)
    story.add(event, ids.view_id(*key))


def _add_outcome(
    story: Story, key: Key, rng: random.Random, fate: str, choice: Choice, chosen: tuple[int, float]
) -> Any:
    decision_id = ids.decision_id(*key)
    match fate:
        case "no_view" if story.rivals[key]:
            return "view_differs"
        case "wrong_view":
            return "view_damaged"  # no bytes of another boundary have this digest
        case "whole" if choice.action is Action.WAIT:
            return (*chosen, 0.0)
        case "whole":
            if rng.random() < 0.5:
                reported(story, key, choice, decision_id, method="before_after", after=0.9)
            gained = rng.choice((0.25, -0.125, 0.0))
            reported(story, key, choice, decision_id, after=0.5 + gained)
            gained -= 0.25 * 16 / 128 + 0.5 * 32 / 256  # RENT, of FORK's sizes
            gained = -gained if choice.action is Action.CULL else gained
            if rng.random() < 0.3:
                reported(story, key, choice, decision_id, after=0.875)
            return (*chosen, gained)
        case "wrong_report":
            reported(story, key, choice, decision_id, blueprint_id="another")
            story.wrong_reports += 1
            return "no_report"
        case "no_metric":
            reported(story, key, choice, decision_id, after=None)
        case "placebo":
            reported(story, key, choice, decision_id, after=0.75, fork=FORK.model_copy(update={"is_placebo": True}))
            return (*chosen, 0.0)
        case "before_after":
            reported(story, key, choice, decision_id, method="before_after")
        case "refused":
            assert choice.seed is not None
            story.sequence += 1
            event = events.CommandRejected(
                run_id=key[0], incarnation=key[1], sequence=story.sequence, step=1, layer_id=choice.seed.layer_id,
                seed_id=choice.seed.seed_id, command_id=ids.command_id(decision_id), reason="expired",
            )  # fmt: skip
            story.add(event, ids.trainer_event_id(key[0], key[1], story.sequence))
        case _:
            pass
    return fate


def lay_out(stories: list[Story], rng: random.Random, share_resent: float = 0.0) -> list[StoredRecord]:
    """Return the records of a log, partition by partition."""
    offsets: dict[TopicPartition, int] = {}
    records: list[StoredRecord] = []
    for topic in sorted({name for story in stories for name in story.messages}):
        waiting = [list(story.messages.get(topic, [])) for story in stories]
        sent: list[OonaMessage] = []
        while any(waiting):
            queue = rng.choice([q for q in waiting if q])
            sent.append(queue.pop(0))
            records.append(_record(sent[-1], offsets, rng))
            while rng.random() < share_resent:
                records.append(_record(rng.choice(sent), offsets, rng))
    return records


def _record(message: OonaMessage, offsets: dict[TopicPartition, int], rng: random.Random) -> StoredRecord:
    topic, record = message.registration.topic, encode(message)
    assert record.key is not None
    place = (topic.name, partition_for(record.key, topic.num_partitions))
    offset = offsets[place] = offsets.get(place, -1) + rng.choice((1, 1, 3))
    return StoredRecord(Position(*place, offset), record.key, record.value, record.headers, 0)
