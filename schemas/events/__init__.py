"""All event models, and ``AnyEvent``: their closed union, discriminated by ``type``."""

from typing import Annotated

from pydantic import Field

from esper.schemas.events.base import Event, RunEvent, TrainerEvent
from esper.schemas.events.blueprints import (
    BlueprintChangeRequested,
    CertificateIssued,
    KernelRefused,
    KernelRegistered,
)
from esper.schemas.events.commands import CullSeed, FossilizeSeed, GerminateSeed, SeedCommand
from esper.schemas.events.dead_letters import DeadLetterRedriven
from esper.schemas.events.policies import (
    LogRange,
    PolicyActivated,
    PolicyEvaluated,
    PolicyRolledBack,
    PolicyTrained,
)
from esper.schemas.events.runs import (
    BoundaryReached,
    CheckpointSaved,
    EpochCompleted,
    RunEnded,
    RunResumed,
    RunStarted,
    TelemetryGap,
)
from esper.schemas.events.seeds import BreakerChanged, CommandRejected, FieldReported, ForkedPair, SeedTransitioned
from esper.schemas.events.tamiyo import DecisionMade, ViewRecorded
from esper.schemas.events.telemetry import LayerHealthMeasured

AnyCommand = GerminateSeed | CullSeed | FossilizeSeed

AnyEvent = Annotated[
    LayerHealthMeasured
    | RunStarted
    | RunResumed
    | BoundaryReached
    | EpochCompleted
    | CheckpointSaved
    | TelemetryGap
    | RunEnded
    | ViewRecorded
    | DecisionMade
    | GerminateSeed
    | CullSeed
    | FossilizeSeed
    | SeedTransitioned
    | CommandRejected
    | BreakerChanged
    | FieldReported
    | BlueprintChangeRequested
    | CertificateIssued
    | KernelRegistered
    | KernelRefused
    | PolicyTrained
    | PolicyEvaluated
    | PolicyActivated
    | PolicyRolledBack
    | DeadLetterRedriven,
    Field(discriminator="type"),
]
"""Any event: ``TypeAdapter(AnyEvent)`` parses values of every newest version."""

__all__ = [
    "AnyCommand",
    "AnyEvent",
    "BlueprintChangeRequested",
    "BoundaryReached",
    "BreakerChanged",
    "CertificateIssued",
    "CheckpointSaved",
    "CommandRejected",
    "CullSeed",
    "DeadLetterRedriven",
    "DecisionMade",
    "EpochCompleted",
    "Event",
    "FieldReported",
    "ForkedPair",
    "FossilizeSeed",
    "GerminateSeed",
    "KernelRefused",
    "KernelRegistered",
    "LayerHealthMeasured",
    "LogRange",
    "PolicyActivated",
    "PolicyEvaluated",
    "PolicyRolledBack",
    "PolicyTrained",
    "RunEnded",
    "RunEvent",
    "RunResumed",
    "RunStarted",
    "SeedCommand",
    "SeedTransitioned",
    "TelemetryGap",
    "TrainerEvent",
    "ViewRecorded",
]
