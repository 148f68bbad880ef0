"""S3 behind a network that resets, cuts, stalls and flips bits: every operation succeeds, no blob is lost or torn."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults.s3_storm import S3Storm, summary
from support.proxies.s3_proxy import FAULTS, S3FaultProxy

from esper.embedded.processes import free_port
from esper.embedded.s3 import EmbeddedS3

RATE = 0.08  # of all requests


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[EmbeddedS3]:
    """A separate S3."""
    s3 = EmbeddedS3(tmp_path / "s3")
    s3.start()
    yield s3
    s3.stop()


@pytest.mark.timeout(3600)
async def test_storm_loses_and_tears_no_blob(
    own_s3: EmbeddedS3, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    num_operations, seed = request.config.getoption("--s3-operations"), request.config.getoption("--fault-seed")
    with S3FaultProxy(free_port(), own_s3.endpoint_url, rate=RATE, seed=seed) as proxy:
        storm = S3Storm(own_s3, proxy, tmp_path, num_operations, seed)
        seconds = await storm.run()
        print(f"\n{summary(storm, proxy, seconds, seed)}")
    await storm.check()
    if num_operations >= 1000:
        assert set(proxy.counts) == set(FAULTS), "a fault never happened"
