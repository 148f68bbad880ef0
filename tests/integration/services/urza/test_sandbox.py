"""The sandbox of blueprints: whatever a module does, its job ends with a reason, and the next one runs."""

import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.conditions import wait_until
from support.paths import PROCESSES

from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind
from esper.services.urza.certification.sandbox import Sandbox
from esper.services.urza.certification.sandbox_messages import BuildJob, Examination, ExamineJob, Limits, WantedKernel
from esper.services.urza.certification.sandbox_process import NICENESS
from esper.services.urza.kernels.shipped_blueprints import SHIPPED

HOSTILE = (sys.executable, "-P", str(PROCESSES / "hostile_sandbox.py"))
TIGHT = Limits(wall_s=1.5, cpu_s=1, memory_bytes=1 << 30, output_bytes=1 << 20)
ROOMY = Limits(wall_s=60.0, cpu_s=30, memory_bytes=1 << 30, output_bytes=1 << 20)
SECRET = "not-for-blueprints"

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[Sandbox]:
    """One for all tests: each also checks that the jobs before left it intact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPER_S3__SECRET_KEY", SECRET)
        async with Sandbox(ROOMY, HOSTILE) as opened:
            yield opened


async def examined(sandbox: Sandbox, module: str, limits: Limits | None = None, **options: float) -> Examination:
    spec = BlueprintSpec(module=module, parameters=options, targets=("linear",))
    return await sandbox.examine(ExamineJob(blueprint_id="b", spec=spec, widths=(16,), kernel_rng_seed=0), limits)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("loops", "it (used more than 1 s of processor time|took longer than 1.5 s)"),
        ("sleeps", "it took longer than 1.5 s"),
        ("exits", "its output is not an examination"),
        ("raises", "it ended with exit code"),
        ("crashes", "it was killed by SIGSEGV"),
        ("kills_the_sandbox", "it broke the sandbox process"),
        ("floods", "its output exceeds 1048576 bytes"),
    ],
)
async def test_module_that_breaks_its_worker_is_contained(sandbox: Sandbox, module: str, reason: str) -> None:
    found = await examined(sandbox, module, TIGHT if module in ("loops", "sleeps") else None)
    assert found.build_error is not None
    assert re.match(f"contained in the sandbox: {reason}", found.build_error)
    assert (await examined(sandbox, "affine")).build_error is None, "the next one runs"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("hoards", "allocate"),
        ("hoards_bytes", "MemoryError"),
        ("writes_files", "File too large"),
        ("is_not_identity", "identity: linear, 16 features: it would change its layer at once"),
        ("loses_the_shape", "shapes: linear, 16 features: it made (16, 16)"),
        ("costs_more", "cost: linear, 16 features: it takes 8192 FLOPs for a sample, the catalogue declares 0"),
        ("never_learns", "gradient_flow: linear, 16 features: no gradient reaches bias"),
        ("stays_at_zero", "gradient_flow: linear, 16 features: no gradient reaches weight"),
        ("rolls_dice", "it adds something else to the same h each time"),
        ("overflows", "extremes: linear, 16 features: equal values become values that are not finite"),
    ],
)
async def test_module_with_wrong_behaviour_fails_a_check(sandbox: Sandbox, module: str, reason: str) -> None:
    found = await examined(sandbox, module)
    assert found.check_error is not None
    assert reason in found.check_error


@pytest.mark.parametrize(
    ("module", "options", "reason"),
    [
        ("nothing_known", {}, "no module 'nothing_known' in the catalogue"),
        ("low_rank", {"rank": 10**300}, "rank must be a whole number in 1..1024"),
        ("low_rank", {"rank": 2.5}, "rank must be a whole number"),
        ("affine", {f"option-{n}": n for n in range(20_000)}, "affine takes []"),
        ("huge", {}, "allocate"),
    ],
)
async def test_build_error_is_one_short_line(
    sandbox: Sandbox, module: str, options: dict[str, float], reason: str
) -> None:
    found = await examined(sandbox, module, None, **options)
    assert found.build_error is not None
    assert reason in found.build_error
    assert len(found.build_error) <= 500
    assert found.build_error.isprintable()


async def test_job_sees_no_credential_and_leaves_no_process(sandbox: Sandbox) -> None:
    seen = await examined(sandbox, "reports_what_it_sees")
    assert seen.check_error is not None
    assert "ESPER" not in seen.check_error
    lower = min(19, os.nice(0) + NICENESS)
    assert f"nice {lower}" in seen.check_error, "training and the API come first"
    left = await examined(sandbox, "forks")
    assert left.check_error is not None
    child = int(left.check_error.rsplit("left behind: ", 1)[1])
    wait_until(lambda: not _is_running(child), 20, "the end of the process that was left behind")


def _is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


async def test_wide_blueprint_is_examined_where_it_fits(sandbox: Sandbox) -> None:
    found = await examined(sandbox, "mlp", None, width=4096)
    assert [m.num_features for m in found.measurements] == [256]
    assert found.measurements[0].num_parameters == 2 * 256 * 4096 + 4096 + 256
    same = BlueprintSpec(module="affine", targets=("linear",) * 50)
    again = await sandbox.examine(ExamineJob(blueprint_id="b", spec=same, widths=(8, 8), kernel_rng_seed=0))
    assert [m.num_features for m in again.measurements] == [8]
    many = BlueprintSpec(module="affine", targets=("linear",) * 5000)
    refused = await sandbox.examine(ExamineJob(blueprint_id="b", spec=many, widths=(8,), kernel_rng_seed=0))
    assert "a header of 75368 bytes; 65536 at most" in str(refused.build_error)


async def test_measurements_are_those_of_the_module(sandbox: Sandbox) -> None:
    spec = SHIPPED["residual-3x3"]
    found = await sandbox.examine(ExamineJob(blueprint_id="b", spec=spec, widths=(8, 16), kernel_rng_seed=0))
    small, large = found.measurements
    assert (small.target, small.num_features, large.num_features) == (LayerKind.CONV2D, 8, 16)
    assert large.flops == 2 * 2 * 9 * 16 * 16 * large.positions
    assert 0 < small.latency_p50_ms <= small.latency_p95_ms
    outputs = 4 * large.batch_size * large.positions * large.num_features
    assert 2 * outputs < large.peak_memory_bytes < 10 * outputs


async def test_examined_kernels_are_those_that_the_builder_builds(sandbox: Sandbox) -> None:
    spec = SHIPPED["affine"]
    job = ExamineJob(blueprint_id="b", spec=spec, widths=(8, 16), kernel_rng_seed=3)
    examined = (await sandbox.examine(job)).kernels
    assert [(k.target, k.num_features) for k in examined] == [(kind, n) for kind in spec.targets for n in job.widths]
    wanted = tuple(
        WantedKernel(blueprint_id="b", blueprint_version=3, spec=spec, target=k.target, num_features=k.num_features)
        for k in examined
    )
    built, failure = await sandbox.build(BuildJob(kernels=wanted, kernel_rng_seed=3))
    assert failure is None
    assert [(b.data, b.header.num_parameters) for b in built] == [(k.data, k.num_parameters) for k in examined]
    large = await sandbox.examine(job.model_copy(update={"spec": SHIPPED["mlp-64"], "widths": (4096,)}))
    assert large.checks
    assert not large.kernels, "what exceeds half of the output's limit is left to the builder"


async def test_kernels_before_a_failing_one_are_kept(sandbox: Sandbox) -> None:
    spec = BlueprintSpec(module="exits_at_13", targets=("linear",))
    kernels = tuple(
        WantedKernel(blueprint_id="b", blueprint_version=3, spec=spec, target="linear", num_features=n)
        for n in range(10, 20)
    )
    built, failure = await sandbox.build(BuildJob(kernels=kernels, kernel_rng_seed=0))
    assert len(built) == 3
    assert failure == "contained in the sandbox: it ended without a result"
    built, failure = await sandbox.build(BuildJob(kernels=kernels[4:], kernel_rng_seed=0))
    assert (len(built), failure) == (6, None)


async def test_killed_process_is_replaced(sandbox: Sandbox) -> None:
    assert sandbox.pid is not None
    os.kill(sandbox.pid, 9)
    assert (await examined(sandbox, "affine")).build_error is None
