"""The reward rises with the gain and falls with size; the noise floor has the statistics that it claims."""

import math
import uuid
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from esper.schemas.enums import Action
from esper.schemas.events import FieldReported, ForkedPair
from esper.services.tamiyo.evaluation.reward import MIN_DIFFERENCES, noise_floor, reward, reward_of
from esper.services.tamiyo.settings import RentSettings

GAINS = st.floats(-1, 1)
SIZES = st.integers(0, 10**12)
HOSTS = st.integers(1, 10**12)
RENTS = st.builds(
    lambda p, f: RentSettings.model_validate({"parameters": p, "flops": f}), st.floats(0, 10), st.floats(0, 10)
)
RENT = RentSettings.model_validate({"parameters": 0.5, "flops": 0.25})


@given(GAINS, GAINS, SIZES, HOSTS, SIZES, HOSTS, RENTS)
def test_reward_rises_with_the_gain(
    gain: float, other: float, parameters: int, host: int, flops: int, host_flops: int, rent: RentSettings
) -> None:
    low, high = sorted((gain, other))
    sizes = parameters, host, flops, host_flops, rent
    assert reward(low, *sizes) <= reward(high, *sizes)


@given(GAINS, SIZES, SIZES, HOSTS, SIZES, SIZES, HOSTS, RENTS)
def test_reward_falls_with_size_and_rises_with_the_hosts(
    gain: float, parameters: int, more: int, host: int, flops: int, more_flops: int, host_flops: int, rent: RentSettings
) -> None:
    small = reward(gain, parameters, host, flops, host_flops, rent)
    assert reward(gain, parameters + more, host, flops, host_flops, rent) <= small
    assert reward(gain, parameters, host, flops + more_flops, host_flops, rent) <= small
    assert reward(gain, parameters, host + more, flops, host_flops + more_flops, rent) >= small
    assert small <= gain


@given(HOSTS, HOSTS, RENTS)
def test_reward_of_no_gain_and_no_size_is_zero(host: int, flops: int, rent: RentSettings) -> None:
    assert reward(0.0, 0, host, 0, flops, rent) == 0.0


def test_rent_is_a_share_of_the_host() -> None:
    assert reward(0.5, 50, 100, 300, 400, RENT) == 0.5 - 0.5 * 0.5 - 0.25 * 0.75


@pytest.mark.parametrize("wrong", [(0.1, -1, 1, 0, 1), (0.1, 0, 0, 0, 1), (0.1, 0, 1, -1, 1), (0.1, 0, 1, 0, 0)])
def test_reward_rejects_impossible_sizes(wrong: tuple[float, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="sizes must not be negative"):
        reward(*wrong, RENT)
    with pytest.raises(ValueError, match="finite"):
        reward(math.nan, *wrong[1:], RENT)


def report(before: float | None, after: float | None, **changed: Any) -> FieldReported:
    fork = ForkedPair(
        horizon_steps=10, num_draws=2, variance=0.25, num_parameters_host=100, flops_added=300, flops_host=400,
        is_placebo=changed.pop("is_placebo", False),
    )  # fmt: skip
    fields = {
        "run_id": "r", "incarnation": 1, "sequence": 0, "step": 0, "layer_id": "fc1", "seed_id": 0, "blueprint_id": "b",
        "outcome": "evaluating", "decision_id": uuid.UUID(int=1), "command_id": uuid.UUID(int=2), "method": "fork",
        "metric": "val_accuracy", "before": before, "after": after, "germinated_at_step": 1, "num_parameters": 50,
        "fork": fork,
    }  # fmt: skip
    return FieldReported.model_validate({**fields, **changed})


@given(GAINS, GAINS, st.sampled_from(["evaluating", "fossilized", "training", "culled", "cancelled"]))
def test_reward_of_a_cull_is_that_of_keeping_negated(before: float, after: float, outcome: str) -> None:
    measured = report(before, after, outcome=outcome)
    kept, cull = (reward_of(measured, action, RENT) for action in (Action.FOSSILIZE, Action.CULL))
    assert kept is not None
    assert cull == (-kept[0], 0.25)
    assert kept[0] == pytest.approx(after - before - 0.25 - 0.1875)


def test_seed_culled_by_the_horizon_pays_no_rent() -> None:
    assert reward_of(report(0.5, 0.625, outcome="culled"), Action.GERMINATE, RENT) == (0.125, 0.25)
    standing = reward_of(report(0.5, 0.625), Action.GERMINATE, RENT)
    assert standing == (0.125 - 0.25 - 0.1875, 0.25)


def test_reports_without_a_measured_difference_give_no_reward() -> None:
    record = report(0.5, 0.75, method="before_after", fork=None, outcome="culled")
    for unmeasured in (record, report(None, 0.5), report(0.5, None)):
        assert reward_of(unmeasured, Action.GERMINATE, RENT) is None
    assert reward_of(report(0.5, 0.75, is_placebo=True), Action.GERMINATE, RENT) == (0.0, 0.0)
    with pytest.raises(ValueError, match="WAIT"):
        reward_of(report(0.5, 0.75), Action.WAIT, RENT)


@given(st.lists(st.floats(-1, 1), min_size=MIN_DIFFERENCES, max_size=60), st.floats(0.1, 4))
def test_noise_floor_shifts_and_scales_with_differences(differences: list[float], factor: float) -> None:
    floor = noise_floor(differences)
    assert floor.low <= floor.mean <= floor.high
    assert floor.sd_low <= floor.sd <= floor.sd_high
    assume(floor.sd > 1e-6)
    moved, stretched = (
        noise_floor([d + 0.5 for d in differences]),
        noise_floor([d * factor for d in differences]),
    )
    assert (moved.sd, moved.high) == pytest.approx((floor.sd, floor.high + 0.5), abs=1e-9)
    assert (stretched.sd, stretched.high) == pytest.approx((floor.sd * factor, floor.high * factor), abs=1e-9)
    assert noise_floor(differences[::-1]) == floor


def test_noise_floor_intervals_have_their_coverage() -> None:
    generator, covered, covered_sd, rounds = torch.Generator().manual_seed(1), 0, 0, 4000
    for _round in range(rounds):
        drawn = (0.02 * torch.randn(9, generator=generator, dtype=torch.float64)).tolist()
        floor = noise_floor(drawn[:8])
        covered += floor.low <= drawn[8] <= floor.high
        covered_sd += floor.sd_low <= 0.02 <= floor.sd_high
    assert covered / rounds == pytest.approx(0.95, abs=0.012)
    assert covered_sd / rounds == pytest.approx(0.95, abs=0.012)


def test_noise_floor_rejects_few_or_missing_differences() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        noise_floor([0.1] * 4)
    with pytest.raises(ValueError, match="not finite"):
        noise_floor([0.1] * 4 + [math.nan])
