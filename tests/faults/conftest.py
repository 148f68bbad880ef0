"""Options of the fault suites, and what is too slow for every run of the tests."""

import pytest

SLOW_ROUNDS = 8


@pytest.fixture
def slow_proof(request: pytest.FixtureRequest) -> None:
    """Skip where few rounds of faults are wanted."""
    if request.config.getoption("--fault-rounds") < SLOW_ROUNDS:
        pytest.skip(f"a slow proof: make faults-streams (--fault-rounds {SLOW_ROUNDS} or more)")
