"""What a blueprint must do before it may grow in anybody's network: the checks behind a certificate.

Runs in the sandbox alone. A module is built as a trainer would have it, from the bytes of its kernel, for each kind
of layer that the blueprint names, at each width that was asked for; then the checks run in the order of ``CHECKS``.

F: features. N: ``BATCH_SIZE`` samples. h is (N, P, F) for linear layers, (N, F, L) and (N, F, H, W) for convolutions.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from esper.errors import KernelError
from esper.kasmina.catalogue import Cost, cost_of
from esper.kasmina.hosts import CHANNEL_DIM
from esper.kasmina.kernels import build_kernel, load_grown, load_kernel, pack
from esper.schemas.assets import BlueprintSpec, Measurement
from esper.schemas.enums import LayerKind
from esper.services.urza.certification.module_measurement import Meter, latencies_ms
from esper.services.urza.certification.sandbox_jobs import Examination, Examine, reason_of

BATCH_SIZE = 16
PLACES: Mapping[LayerKind, tuple[int, ...]] = MappingProxyType(
    {LayerKind.LINEAR: (16,), LayerKind.CONV1D: (32,), LayerKind.CONV2D: (8, 8)}
)
"""The positions of one sample."""

WIDER = (128, 256, 512, 1024, 2048, 4096)
"""Where every width asked for is refused, the first of these that is not: some blueprints are for wide layers only."""

EXTREME = 1e6  # float32 ends at 3e38: what overflows here would do so in somebody's training
STEP = 0.1  # how far a weight goes off zero; trained ones go further


@dataclass(frozen=True, slots=True)
class Subject:
    """A module under examination. Checks from ``gradient_flow`` on leave its weights off zero."""

    blueprint_id: str
    spec: BlueprintSpec
    kind: LayerKind
    num_features: int
    cost: Cost
    module: nn.Module

    @property
    def places(self) -> tuple[int, ...]:
        """The positions of a sample of h."""
        return PLACES[self.kind]

    @property
    def num_positions(self) -> int:
        """How many there are."""
        return torch.Size(self.places).numel()

    def outputs(self) -> Tensor:
        """An h whose features differ in mean and spread, from sample to sample."""
        spatial = -CHANNEL_DIM[self.kind] - 1
        flat = (*self.places, self.num_features) if not spatial else (self.num_features, *self.places)
        means = (1, self.num_features) if not spatial else (self.num_features, *(1,) * spatial)
        return torch.randn(BATCH_SIZE, *flat) + torch.randn(BATCH_SIZE, *means)


Check = Callable[[Subject], None]


def examine(job: Examine) -> Examination:
    """Build the blueprint everywhere it may go, check it, measure it. Raises nothing that a blueprint can cause."""
    torch.manual_seed(job.kernel_seed)
    examiner = f"torch {torch.__version__}, cpu, {torch.get_num_threads()} thread"[:64]
    try:
        subjects = [
            _built(job, kind, width) for kind in dict.fromkeys(job.spec.targets) for width in _widths(job, kind)
        ]
    except Exception as error:  # whatever it is, it is this blueprint's
        return Examination(not_built=_told(error), examiner=examiner)
    passed: list[str] = []
    for name, check in CHECKS.items():
        for subject in subjects:
            try:
                check(subject)
            except Exception as error:
                where = f"{name}: {subject.kind}, {subject.num_features} features"
                return Examination(not_passed=reason_of(f"{where}: {_told(error)}"), examiner=examiner)
        passed.append(name)
    return Examination(examiner=examiner, checks=tuple(passed), measurements=tuple(map(_measured, subjects)))


def _told(error: Exception) -> str:
    return reason_of(str(error) if isinstance(error, KernelError) else f"{type(error).__name__}: {error}")


def _widths(job: Examine, kind: LayerKind) -> Iterator[int]:
    """The widths asked for that the catalogue's limits allow, or one that they do. All is arithmetic."""
    refusals, found = [], False
    for width in dict.fromkeys((*job.widths, *WIDER)):
        if width in WIDER and width not in job.widths and found:
            return
        try:
            cost_of(job.spec, kind, width)
        except KernelError as error:
            refusals.append(error)
            continue
        found = True
        yield width
    if not found:
        raise refusals[0]


def _built(job: Examine, kind: LayerKind, width: int) -> Subject:
    data = build_kernel(job.blueprint_id, job.spec, kind, width, seed=job.kernel_seed)
    module = load_kernel(data, hashlib.sha256(data).hexdigest()).build()
    return Subject(job.blueprint_id, job.spec, kind, width, cost_of(job.spec, kind, width), module)


def _identity(subject: Subject) -> None:
    """Fresh, it adds exactly 0, in training and in evaluation, to small values and to large ones."""
    h = subject.outputs()
    for scale in (1.0, 0.0, EXTREME):
        for mode in (True, False):
            added = subject.module.train(mode)(scale * h)
            if added.any() or not added.isfinite().all():
                raise KernelError("it would change its layer at once")


def _shapes(subject: Subject) -> None:
    """s(h) has the shape and type of h, for one sample without a batch dimension too; no state is kept."""
    h = subject.outputs()
    for given in (h, h[:1], h[0]):
        added = subject.module(given)
        if added.shape != given.shape or added.dtype != given.dtype:
            raise KernelError(
                f"it made {tuple(added.shape)} {added.dtype} of {tuple(given.shape)} {given.dtype}: it must keep both"
            )
    if list(subject.module.buffers()):
        raise KernelError("it has buffers: what it adds must depend on h alone")


def _cost(subject: Subject) -> None:
    """Parameters and FLOPs are those that the catalogue declares."""
    counted = sum(p.numel() for p in subject.module.parameters())
    if counted != subject.cost.num_parameters:
        raise KernelError(f"it has {counted} parameters, the catalogue declares {subject.cost.num_parameters}")
    flops, declared = _flops(subject), subject.cost.flops(subject.num_positions)
    if flops != declared:
        raise KernelError(f"it takes {flops} FLOPs for a sample, the catalogue declares {declared}")


def _gradient_flow(subject: Subject) -> None:
    """Off zero, every parameter gets a finite gradient that is not all zero. The placebo has none to get.

    The first step reaches what starts at zero, the second what lies behind it.
    """
    parameters, h = list(subject.module.parameters()), subject.outputs()
    if not parameters:
        return
    wanted = torch.randn_like(h)
    for _step in range(2):
        for parameter, gradient in zip(parameters, _gradients(subject, h, wanted), strict=True):
            if gradient is not None and gradient.any():
                parameter.data -= STEP * gradient / gradient.abs().max()
    for (name, _p), gradient in zip(subject.module.named_parameters(), _gradients(subject, h, wanted), strict=True):
        if gradient is None or not gradient.any():
            raise KernelError(f"no gradient reaches {name}: it would never learn")
        if not gradient.isfinite().all():
            raise KernelError(f"the gradient of {name} is not finite")
    first, again = subject.module(h), subject.module(h)
    if not first.any():
        raise KernelError("it has parameters, and adds nothing whatever they are")
    if not torch.equal(first, again):
        raise KernelError("it adds something else to the same h each time")


def _extremes(subject: Subject) -> None:
    """Off zero, output and gradients stay finite where h is extreme."""
    h = subject.outputs()
    signs = torch.where(h > 0, EXTREME, -EXTREME)
    for name, given in (
        ("zeros", torch.zeros_like(h)),
        ("equal values", torch.full_like(h, EXTREME)),
        ("large values", EXTREME * h),
        ("large values of either sign", signs),
        ("tiny values", 1e-30 * h),
    ):
        given.requires_grad_()
        added = subject.module(given)
        finite = bool(added.isfinite().all())
        if finite and added.requires_grad:
            finite = all(bool(g.isfinite().all()) for g in torch.autograd.grad(added.sum(), _learning(subject, given)))
        if not finite:
            raise KernelError(f"{name} become values that are not finite")


def _round_trip(subject: Subject) -> None:
    """Packed as a checkpoint packs it and read back, it does the same to the bit."""
    weights = dict(subject.module.state_dict())
    packed = pack(subject.blueprint_id, subject.spec, subject.kind, subject.num_features, weights)
    again, h = load_grown(packed).build(), subject.outputs()
    if not torch.equal(again(h), subject.module(h)):
        raise KernelError("read back from its bytes, it does something else")


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "identity": _identity,
        "shapes": _shapes,
        "cost": _cost,
        "gradient_flow": _gradient_flow,
        "extremes": _extremes,
        "round_trip": _round_trip,
    }
)
"""Name, as certificates have it -> the check; in this order."""


def _learning(subject: Subject, h: Tensor) -> list[Tensor]:
    return [h, *subject.module.parameters()]


def _gradients(subject: Subject, h: Tensor, wanted: Tensor) -> tuple[Tensor | None, ...]:
    loss = (subject.module(h) * wanted).sum()
    return torch.autograd.grad(loss, list(subject.module.parameters()), allow_unused=True)


def _flops(subject: Subject) -> int:
    with torch.no_grad(), Meter() as meter:
        subject.module(subject.outputs()[:1])
    return meter.flops


def _measured(subject: Subject) -> Measurement:
    h = subject.outputs().requires_grad_()
    with Meter() as meter:
        added = subject.module(h)
        if added.requires_grad:
            added.sum().backward()
    with torch.inference_mode():
        median, p95 = latencies_ms(lambda: subject.module(h))
    return Measurement(
        target=subject.kind,
        num_features=subject.num_features,
        num_parameters=subject.cost.num_parameters,
        positions=subject.num_positions,
        flops=_flops(subject),
        batch_size=BATCH_SIZE,
        latency_p50_ms=median,
        latency_p95_ms=p95,
        peak_memory_bytes=meter.peak_bytes,
    )
