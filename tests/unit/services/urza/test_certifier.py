"""The events of several certifiers at once, and the kernel builder with kernels of which some cannot be built."""

import asyncio
import random
import uuid
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.errors import KernelError, UnavailableError
from esper.kasmina.catalogue import CATALOGUE, cost_of
from esper.logging import trace_id_of
from esper.schemas.assets import Blueprint, BlueprintSpec, Measurement
from esper.schemas.change_verdicts import judge
from esper.schemas.enums import BlueprintStatus, LayerKind, Verdict
from esper.schemas.events import BlueprintChangeRequested, CertificateIssued, KernelRefused, KernelRegistered
from esper.schemas.messages import OonaMessage, child_traceparent
from esper.services.urza.certification.certifier import certification_events
from esper.services.urza.certification.sandbox_messages import (
    BuildJob,
    BuiltKernel,
    Examination,
    ExaminedKernel,
    ExamineJob,
    KernelHeader,
    WantedKernel,
    decode_frames,
    encode_frame,
    reason_of,
)
from esper.services.urza.kernels.examined_kernels import ExaminedKernels
from esper.services.urza.kernels.kernel_builder import KernelBuilder
from esper.services.urza.library_queries import Cause
from esper.services.urza.settings import UrzaSettings

SPEC = BlueprintSpec(module="affine", targets=("linear",))
CAUSE = Cause(uuid.UUID(int=7), child_traceparent(None))
MEASURED = Measurement(
    target="linear", num_features=8, num_parameters=16, positions=16, flops=0, batch_size=16, latency_p50_ms=0.1,
    latency_p95_ms=0.2, peak_memory_bytes=100,
)  # fmt: skip
PASSED = Examination(examiner="test", checks=("identity",), measurements=(MEASURED,))
examinations = st.sampled_from(
    [
        PASSED,
        Examination(build_error="x" * 2000),
        Examination(check_error="identity: no"),
        Examination(build_error="\u2028\n"),
    ]
)


def judged(blueprint: Blueprint, messages: list[OonaMessage]) -> tuple[Blueprint, list[Verdict]]:
    """The verdicts of the projection: a repeated id keeps its first."""
    verdicts: dict[uuid.UUID, Verdict] = {}
    for message in messages:
        if isinstance(message.data, BlueprintChangeRequested) and message.id not in verdicts:
            verdicts[message.id], after = judge(blueprint, message.data)
            blueprint = after or blueprint
    return blueprint, list(verdicts.values())


@given(
    found=st.lists(examinations, min_size=1, max_size=4),
    status=st.sampled_from(["proposed", "compiled"]),
    version=st.integers(1, 9),
    order=st.randoms(use_true_random=False),
)
def test_several_certifiers_take_a_blueprint_to_one_end(
    found: list[Examination], status: str, version: int, order: random.Random
) -> None:
    initial = Blueprint(blueprint_id="b", version=version, status=status, spec=SPEC)
    left = [list(certification_events("b", version, status, f)) for f in found]
    mixed = []
    while any(left):
        mixed.append(order.choice([queue for queue in left if queue]).pop(0))
    ended, verdicts = judged(initial, mixed)
    ends = {BlueprintStatus.CERTIFIED if f is PASSED else BlueprintStatus.REJECTED for f in found}
    assert ended.status in ends
    assert ended.version == version + verdicts.count(Verdict.ACCEPTED)
    if ended.status is BlueprintStatus.CERTIFIED:
        certificates = [m.data for m in mixed if isinstance(m.data, CertificateIssued)]
        assert ended.version - 1 in {c.blueprint_version for c in certificates}


def test_certificate_is_the_cause_of_its_certification() -> None:
    compiled, certificate, certified = certification_events("b", 1, "proposed", PASSED, CAUSE)
    assert [m.data.expected_version for m in (compiled, certified)] == [1, 2]
    assert isinstance(certificate.data, CertificateIssued)
    assert certificate.data.blueprint_version == 2
    causes = [m.causation_id for m in (compiled, certificate, certified)]
    assert causes == [CAUSE.id, compiled.id, certificate.id]
    assert {trace_id_of(m.traceparent) for m in (compiled, certificate, certified)} == {trace_id_of(CAUSE.traceparent)}
    assert [m.id for m in certification_events("b", 1, "proposed", PASSED)] == [
        compiled.id,
        certificate.id,
        certified.id,
    ]


@given(st.text())
def test_reason_is_one_printable_line(text: str) -> None:
    assert reason_of(text).isprintable()
    assert len(reason_of(text)) <= 500
    BlueprintChangeRequested(blueprint_id="b", change="reject", expected_version=1, reason=reason_of(text))


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(0, 400))
def test_frames_of_a_cut_off_output_are_read_while_whole(datas: list[bytes], end: int) -> None:
    output = b"".join(encode_frame(KernelHeader(size=len(d)), d) for d in datas)
    read = [k.data for k in decode_frames(output[:end])]
    assert read == datas[: len(read)]
    assert len(read) == len(datas) or end < len(output)


class FakeSandbox:
    """Builds kernels of four bytes each; ``built`` has their widths.

    A job that reaches a culprit ends there; the whole output of a job with a breaker is lost.
    """

    def __init__(self, culprits: set[int], breakers: set[int], refused: set[int]) -> None:
        self.culprits, self.breakers, self.refused, self.built = culprits, breakers, refused, set[int]()

    async def build(self, job: BuildJob) -> tuple[list[BuiltKernel], str | None]:
        built = []
        if any(kernel.num_features in self.breakers for kernel in job.kernels):
            return [], "contained"
        for kernel in job.kernels:
            if kernel.num_features in self.culprits:
                return built, "contained"
            if kernel.num_features in self.refused:
                built.append(BuiltKernel(KernelHeader(refusal="no"), b""))
            else:
                built.append(BuiltKernel(KernelHeader(size=4), kernel.num_features.to_bytes(4, "big")))
                self.built.add(kernel.num_features)
        return built, None


class FakeParts:
    """Reader, producer and blobs in one. ``fails`` are the uploads that fail, once each."""

    def __init__(self, rows: list[dict[str, Any]], fails: set[bytes]) -> None:
        self.rows, self.fails, self.stored, self.sent = rows, fails, dict[str, bytes](), list[OonaMessage]()

    async def all(self, name: str, **_parameters: Any) -> list[dict[str, Any]]:
        assert name == "wanted_kernels"
        return self.rows

    async def put(self, data: bytes) -> str:
        if data in self.fails:
            self.fails.discard(data)
            raise UnavailableError("S3 is away")
        self.stored[data.hex()] = data
        return data.hex().rjust(64, "0")

    async def send(self, message: OonaMessage) -> None:
        self.sent.append(message)

    async def send_batch(self, messages: list[OonaMessage]) -> None:
        self.sent += messages


def kernels_of(widths: set[int]) -> ExaminedKernels:
    """The kernels of blueprint ``b`` that an examination at these widths built."""
    kernels = ExaminedKernels()
    job = ExamineJob(blueprint_id="b", spec=SPEC, widths=(1,), kernel_rng_seed=0)
    found = [
        ExaminedKernel(target="linear", num_features=n, num_parameters=1, data=n.to_bytes(4, "big")) for n in widths
    ]
    kernels.keep(job, PASSED.model_copy(update={"kernels": tuple(found)}))
    return kernels


def test_examination_with_an_error_has_no_kernels() -> None:
    kernel = ExaminedKernel(target="linear", num_features=8, num_parameters=1, data=b"kernel")
    with pytest.raises(ValidationError, match="an examination with an error has no kernels"):
        Examination(check_error="identity: no", kernels=(kernel,))


def test_examined_kernel_is_taken_once_and_for_its_own_spec() -> None:
    wanted = WantedKernel(blueprint_id="b", blueprint_version=3, spec=SPEC, target="linear", num_features=7)
    other = SPEC.model_copy(update={"description": "else"})
    kernels = kernels_of({7})
    for different in ({"spec": other}, {"num_features": 8}, {"target": LayerKind.CONV1D}, {"blueprint_id": "c"}):
        assert kernels.take(wanted.model_copy(update=different)) is None
    found = kernels.take(wanted)
    assert found is not None
    assert (found.data, found.header.size) == ((7).to_bytes(4, "big"), 4)
    assert kernels.take(wanted) is None


@given(
    widths=st.sets(st.integers(1, 200), max_size=120),
    culprits=st.sets(st.integers(1, 200), max_size=20),
    breakers=st.sets(st.integers(1, 200), max_size=5),
    refused=st.sets(st.integers(1, 200), max_size=20),
    fails=st.sets(st.integers(1, 200), max_size=10),
    examined=st.sets(st.integers(1, 200), max_size=10),
)
def test_wanted_kernels_are_registered_or_refused_once(
    widths: set[int], culprits: set[int], breakers: set[int], refused: set[int], fails: set[int], examined: set[int]
) -> None:
    rows = [
        {
            "blueprint_id": "b",
            "version": 3,
            "spec": SPEC.model_dump(),
            "kind": "linear",
            "num_features": n,
            "cause_id": CAUSE.id,
            "traceparent": CAUSE.traceparent,
        }
        for n in sorted(widths)
    ]
    parts = FakeParts(rows, {n.to_bytes(4, "big") for n in fails})
    unbuildable = culprits | breakers | refused
    examined -= unbuildable
    kernels = kernels_of(examined)
    sandbox: Any = FakeSandbox(culprits, breakers, refused)

    async def build_all() -> None:
        builder = KernelBuilder(parts, parts, parts, sandbox, UrzaSettings(), kernels)  # type: ignore[arg-type]
        while True:
            try:
                await builder.build_wanted()
            except UnavailableError:
                continue
            break
        assert await builder.build_wanted() == 0, "kernels that are not projected yet are not built again"

    asyncio.run(build_all())
    registered = [m.data.kernel.num_features for m in parts.sent if isinstance(m.data, KernelRegistered)]
    refusals = [m.data.num_features for m in parts.sent if isinstance(m.data, KernelRefused)]
    assert sorted(registered) == sorted(widths - unbuildable)
    assert set(refusals) == widths & unbuildable
    assert not sandbox.built & (examined - fails), "an examined kernel is not built again"
    assert parts.stored.keys() == {n.to_bytes(4, "big").hex() for n in registered}
    assert len({m.id for m in parts.sent}) == len(widths), "a retry sends the same event"
    assert {m.causation_id for m in parts.sent} <= {CAUSE.id}
    assert {trace_id_of(m.traceparent) for m in parts.sent} <= {trace_id_of(CAUSE.traceparent)}


@given(
    spec=st.builds(
        BlueprintSpec,
        module=st.sampled_from([*CATALOGUE, "nothing_known"]),
        parameters=st.dictionaries(
            st.sampled_from(["rank", "expansion", "width", "reduction", "other"]),
            st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30),
            max_size=2,
        ),
        targets=st.just(("linear",)),
    ),
    target=st.sampled_from(LayerKind),
    width=st.integers(1, 2**31 - 1),
)
def test_cost_is_computed_for_every_spec_of_the_log(spec: BlueprintSpec, target: LayerKind, width: int) -> None:
    with suppress(KernelError):
        assert cost_of(spec, target, width).num_parameters <= 50_000_000
