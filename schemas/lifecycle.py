"""The transition table of a seed's lifecycle: the only one, for Kasmina, the projections and the docs."""

from collections.abc import Mapping
from types import MappingProxyType

from esper.schemas.enums import SeedStage as S

TRANSITIONS: Mapping[S, frozenset[S]] = MappingProxyType(
    {
        S.DORMANT: frozenset({S.GERMINATED}),
        S.GERMINATED: frozenset({S.TRAINING, S.CANCELLED, S.ROLLED_BACK}),
        S.TRAINING: frozenset({S.GRAFTING, S.CANCELLED, S.ROLLED_BACK}),
        S.GRAFTING: frozenset({S.STABILIZING, S.CULLED, S.ROLLED_BACK}),
        S.STABILIZING: frozenset({S.EVALUATING, S.CULLED, S.ROLLED_BACK}),
        S.EVALUATING: frozenset({S.FOSSILIZED, S.CULLED, S.ROLLED_BACK}),
        S.FOSSILIZED: frozenset({S.ROLLED_BACK}),
        S.CANCELLED: frozenset({S.DORMANT}),
        S.CULLED: frozenset({S.DORMANT}),
        S.ROLLED_BACK: frozenset({S.DORMANT}),
    }
)

STAGE_CODES: Mapping[S, int] = MappingProxyType({stage: code for code, stage in enumerate(S)})
"""Stage -> its uint8 in Kasmina's arrays. Append only: checkpoints store the codes."""

STAGES: tuple[S, ...] = tuple(S)
"""Inverse of ``STAGE_CODES``."""

ACTIVE_STAGES = frozenset({S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZING, S.EVALUATING})
"""Stages of a seed that is growing: neither dormant, nor permanent, nor under embargo."""

EMBARGO_STAGES = frozenset({S.CANCELLED, S.CULLED, S.ROLLED_BACK})


def is_allowed(from_stage: S, to_stage: S) -> bool:
    """Whether the table has the transition."""
    return to_stage in TRANSITIONS[from_stage]


def given_up_stage(stage: S) -> S:
    """The stage that a seed enters when it is given up at ``stage``: CANCELLED before grafting, CULLED from then on.

    Raises:
        ValueError: ``stage`` is not one of ``ACTIVE_STAGES``.
    """
    if stage not in ACTIVE_STAGES:
        raise ValueError(
            f"a {stage} seed cannot be given up; the stage must be one of {', '.join(sorted(ACTIVE_STAGES))}"
        )
    return S.CANCELLED if S.CANCELLED in TRANSITIONS[stage] else S.CULLED
