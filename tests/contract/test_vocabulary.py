"""Consistency of the contracts: enums, stage codes, tables, registry, union, topics, projectors, commands."""

import ast
import inspect
import sys
from typing import get_args

import pytest
from support.events.event_examples import registrations_on

from esper.kasmina.catalogue import CATALOGUE
from esper.oona.dead_letters.dead_letter import DEAD_LETTER_SUFFIX
from esper.schemas import events, ids, topics
from esper.schemas.assets import Seed
from esper.schemas.change_verdicts import CHANGES
from esper.schemas.enums import (
    Action,
    BlueprintChange,
    BlueprintStatus,
    BreakerState,
    LayerKind,
    RejectionReason,
    RunStatus,
    SeedStage,
    TransitionReason,
)
from esper.schemas.events import AnyEvent, FieldReported, RunEvent
from esper.schemas.events.seeds import END_STAGES
from esper.schemas.lifecycle import (
    ACTIVE_STAGES,
    EMBARGO_STAGES,
    STAGE_CODES,
    STAGES,
    TRANSITIONS,
    given_up_stage,
    is_allowed,
)
from esper.schemas.operational import STATISTICS, HealthSignal
from esper.schemas.registry import REGISTRY, Registration
from esper.streams.projectors import PROJECTORS

CODES_IN_CHECKPOINTS = (
    "dormant", "germinated", "training", "grafting", "stabilizing", "evaluating", "fossilized", "cancelled", "culled",
    "rolled_back",
)  # fmt: skip
PINNED_IDS = (
    "5a85ecab-0d56-5119-97f4-8328ba13b4a7",
    "b5dd6d3b-6299-5dd3-9d36-204bb881ba94",
    "a0632460-bb64-546d-95a9-47cdddecbb80",
    "992e5b5e-2623-5ac1-bade-7343cbcb8e75",
    "8dff4b8e-693d-5765-9289-e2e61303abc4",
    "286a53a7-a5cd-5f50-9707-fae6e7673b5a",
    "3f42d2d3-8825-5937-aca2-27f502c077ab",
    "ef28a325-cb7b-52bf-af61-d8e85dce719f",
    "1687c857-77c5-5af6-8f38-8c664cb9c97a",
    "d64344f6-69c2-5a48-8d46-b83f04c2267c",
)
COMMANDS = {
    Action.GERMINATE: events.GerminateSeed,
    Action.CULL: events.CullSeed,
    Action.FOSSILIZE: events.FossilizeSeed,
}


def test_stage_codes_match_those_in_checkpoints() -> None:
    assert tuple(STAGES[: len(CODES_IN_CHECKPOINTS)]) == CODES_IN_CHECKPOINTS, "append only"
    assert [STAGE_CODES[stage] for stage in STAGES] == list(range(len(SeedStage)))
    assert len(SeedStage) <= 256


def test_stages_are_partitioned_into_four_kinds() -> None:
    kinds = [ACTIVE_STAGES, EMBARGO_STAGES, {SeedStage.DORMANT}, {SeedStage.FOSSILIZED}]
    assert sum(len(kind) for kind in kinds) == len(SeedStage)
    assert set().union(*kinds) == set(TRANSITIONS) == set(SeedStage)


def test_transitions_reach_every_stage_and_return() -> None:
    reached = {SeedStage.DORMANT}
    for _stage in SeedStage:
        reached |= {to for stage in reached for to in TRANSITIONS[stage]}
    assert reached == set(SeedStage)
    assert all(TRANSITIONS[stage] == {SeedStage.DORMANT} for stage in EMBARGO_STAGES)
    assert all(is_allowed(stage, given_up_stage(stage)) for stage in ACTIVE_STAGES)
    assert {given_up_stage(stage) for stage in ACTIVE_STAGES} == {SeedStage.CANCELLED, SeedStage.CULLED}
    with pytest.raises(ValueError, match="cannot be given up"):
        given_up_stage(SeedStage.FOSSILIZED)


def test_registry_union_and_topics_have_the_same_events() -> None:
    members = get_args(get_args(AnyEvent)[0])
    assert {r.model for r in REGISTRY.values()} == set(members)
    assert len(REGISTRY) == len(members)
    assert {r.topic for r in REGISTRY.values()} == set(topics.TOPICS)
    assert sum(len(registrations_on(spec)) for spec in topics.TOPICS) == len(REGISTRY)
    assert {event.__name__ for event in members} <= set(events.__all__)


@pytest.mark.parametrize("entry", REGISTRY.values(), ids=lambda r: r.type)
def test_event_has_the_key_of_its_topic(entry: Registration) -> None:
    field = entry.model.model_fields[entry.key_field]
    assert field.is_required()
    assert field.annotation is str
    assert {r.key_field for r in registrations_on(entry.topic)} == {entry.key_field}
    assert issubclass(entry.model, RunEvent) == (entry.key_field == "run_id")


def test_topics_keyed_by_run_have_one_partition_count() -> None:
    counts = {r.topic.num_partitions for r in REGISTRY.values() if r.key_field == "run_id"}
    assert len(counts) == 1
    assert all(spec.dead_letters.name == spec.name + DEAD_LETTER_SUFFIX for spec in topics.TOPICS)


def test_every_topic_has_a_projector_for_its_events() -> None:
    assert set(PROJECTORS) == {spec.name for spec in topics.TOPICS}
    for name, projector in PROJECTORS.items():
        tree = ast.parse(inspect.getsource(sys.modules[projector.__module__]))
        named = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        named |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        for entry in REGISTRY.values():
            if entry.topic.name == name:
                assert named & {c.__name__ for c in entry.model.__mro__[:-1]}, entry.type


def test_every_action_but_wait_has_an_allowed_command() -> None:
    assert set(COMMANDS) == set(Action) - {Action.WAIT}
    assert set(COMMANDS.values()) == set(get_args(events.AnyCommand))
    assert is_allowed(events.GerminateSeed.model_fields["expected_stage"].default, SeedStage.GERMINATED)
    assert is_allowed(events.FossilizeSeed.model_fields["expected_stage"].default, SeedStage.FOSSILIZED)
    assert all(f"esper.seed.{action}.v" in COMMANDS[action].model_fields["type"].default for action in COMMANDS)


def test_field_report_outcomes_are_end_and_active_stages() -> None:
    outcomes = set(get_args(FieldReported.model_fields["outcome"].annotation))
    assert set(END_STAGES) == {SeedStage.FOSSILIZED} | EMBARGO_STAGES - {SeedStage.ROLLED_BACK}
    assert outcomes == set(END_STAGES) | ACTIVE_STAGES


def test_run_ends_in_every_status_but_running() -> None:
    ends = set(get_args(events.RunEnded.model_fields["status"].annotation))
    assert ends == set(RunStatus) - {RunStatus.RUNNING}


def test_blueprint_changes_reach_every_status() -> None:
    assert set(CHANGES) == set(BlueprintChange)
    assert {status for _from, status in CHANGES.values()} == set(BlueprintStatus)


def test_catalogue_targets_are_exactly_the_layer_kinds() -> None:
    assert {kind for module in CATALOGUE.values() for kind in module.targets} == set(LayerKind)


def test_statistics_are_exactly_the_nullable_fields() -> None:
    nullable = {n for n, f in HealthSignal.model_fields.items() if f.default is None}
    assert nullable == set(STATISTICS)


def test_seed_starts_dormant() -> None:
    assert Seed(layer_id="fc1", seed_id=0).stage is SeedStage.DORMANT


def test_ids_are_pinned() -> None:
    decision = ids.decision_id("run-1", 1, 2)
    made = [
        ids.trainer_event_id("run-1", 1, 2),
        ids.view_id("run-1", 1, 2),
        decision,
        ids.command_id(decision),
        ids.request_id("key"),
        ids.kernel_event_id("ab" * 32),
        ids.redriven_id(decision, "system.runs", 1, 2),
        ids.library_request_id("noop", 1, "compile"),
        ids.certificate_id("noop", 2),
        ids.kernel_refusal_id("noop", 3, "linear", 8),
    ]
    assert [str(i) for i in made] == list(PINNED_IDS)
    assert ids.trainer_event_id("run-1", 11, 2) != ids.trainer_event_id("run-1", 1, 12)


def test_enum_values_are_the_lower_case_names() -> None:
    for words in (SeedStage, TransitionReason, RejectionReason, Action, RunStatus, BreakerState):
        assert all(word.value == word.name.lower() for word in words)
