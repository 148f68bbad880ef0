"""The checks behind a certificate: what a blueprint must do before it may grow in a network.

Runs in the sandbox only. A module is built as a trainer builds it, from the bytes of its kernel, for each kind of layer
that the blueprint names, at each requested width; then the checks run in the order of ``CHECKS``.

F: features. N: ``BATCH_SIZE`` samples. h is (N, P, F) for linear layers, (N, F, L) and (N, F, H, W) for convolutions.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from esper.services.urza.certification.module_measurement import OperationMeter, latencies_ms
from esper.services.urza.certification.sandbox_messages import Examination, ExaminedKernel, ExamineJob, reason_of

BATCH_SIZE = 16
POSITIONS: Mapping[LayerKind, tuple[int, ...]] = MappingProxyType(
    {LayerKind.LINEAR: (16,), LayerKind.CONV1D: (32,), LayerKind.CONV2D: (8, 8)}
)
"""The shape of one sample of h without its features."""

FALLBACK_WIDTHS = (128, 256, 512, 1024, 2048, 4096)
"""Where the catalogue refuses every requested width, the first of these that it allows: some blueprints are for wide
layers only."""

EXTREME = 1e6  # float32 ends at 3e38: what overflows here overflows in training
STEP = 0.1  # how far a weight moves off zero; trained weights move further


@dataclass(frozen=True, slots=True)
class ExaminedModule:
    """A module under examination. Checks from ``gradient_flow`` on leave its weights off zero."""

    blueprint_id: str
    spec: BlueprintSpec
    kind: LayerKind
    num_features: int
    cost: Cost
    module: nn.Module
    kernel: bytes

    @property
    def num_positions(self) -> int:
        """The number of positions of one sample."""
        return torch.Size(POSITIONS[self.kind]).numel()

    def random_input(self) -> Tensor:
        """An h whose features differ in mean and spread, from sample to sample."""
        positions = POSITIONS[self.kind]
        has_features_last = CHANNEL_DIM[self.kind] == -1
        sample = (*positions, self.num_features) if has_features_last else (self.num_features, *positions)
        means = (1, self.num_features) if has_features_last else (self.num_features, *(1 for _ in positions))
        return torch.randn(BATCH_SIZE, *sample) + torch.randn(BATCH_SIZE, *means)


Check = Callable[[ExaminedModule], None]


def examine(job: ExamineJob, *, max_kernel_bytes: int) -> Examination:
    """Build the blueprint for all its layers, check it, measure it. Raises nothing that a blueprint can cause.

    Args:
        max_kernel_bytes: maximum size of all kernels in the result; it has those that fit, in the order of the modules.
    """
    torch.manual_seed(job.kernel_rng_seed)
    examiner = f"torch {torch.__version__}, cpu, {torch.get_num_threads()} thread"[:64]
    try:
        modules = [
            _build_module(job, kind, width) for kind in dict.fromkeys(job.spec.targets) for width in _widths(job, kind)
        ]
    except Exception as error:  # the blueprint's, whatever its type
        return Examination(build_error=_describe_error(error), examiner=examiner)
    passed: list[str] = []
    for name, check in CHECKS.items():
        for examined in modules:
            try:
                check(examined)
            except Exception as error:
                where = f"{name}: {examined.kind}, {examined.num_features} features"
                return Examination(check_error=reason_of(f"{where}: {_describe_error(error)}"), examiner=examiner)
        passed.append(name)
    return Examination(
        examiner=examiner,
        checks=tuple(passed),
        measurements=tuple(map(_measure, modules)),
        kernels=tuple(_kernels_within(modules, max_kernel_bytes)),
    )


def _describe_error(error: Exception) -> str:
    return reason_of(str(error) if isinstance(error, KernelError) else f"{type(error).__name__}: {error}")


def _widths(job: ExamineJob, kind: LayerKind) -> Iterator[int]:
    """The requested widths that the catalogue allows, or the first fallback that it allows. All is arithmetic."""
    refusals, found = [], False
    for width in dict.fromkeys((*job.widths, *FALLBACK_WIDTHS)):
        if width in FALLBACK_WIDTHS and width not in job.widths and found:
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


def _build_module(job: ExamineJob, kind: LayerKind, width: int) -> ExaminedModule:
    data = build_kernel(job.blueprint_id, job.spec, kind, width, seed=job.kernel_rng_seed)
    module = load_kernel(data, hashlib.sha256(data).hexdigest()).build()
    return ExaminedModule(job.blueprint_id, job.spec, kind, width, cost_of(job.spec, kind, width), module, data)


def _kernels_within(modules: Sequence[ExaminedModule], max_bytes: int) -> Iterator[ExaminedKernel]:
    for examined in modules:
        max_bytes -= len(examined.kernel)
        if max_bytes < 0:
            return
        yield ExaminedKernel(
            target=examined.kind,
            num_features=examined.num_features,
            num_parameters=examined.cost.num_parameters,
            data=examined.kernel,
        )


def _identity(examined: ExaminedModule) -> None:
    """Fresh, it adds exactly 0, in training and in evaluation, to small values and to large ones."""
    h = examined.random_input()
    for scale in (1.0, 0.0, EXTREME):
        for mode in (True, False):
            added = examined.module.train(mode)(scale * h)
            if added.any() or not added.isfinite().all():
                raise KernelError("it would change its layer at once")


def _shapes(examined: ExaminedModule) -> None:
    """s(h) has the shape and type of h, for one sample without a batch dimension too; it keeps no state."""
    h = examined.random_input()
    for given in (h, h[:1], h[0]):
        added = examined.module(given)
        if added.shape != given.shape or added.dtype != given.dtype:
            raise KernelError(
                f"it made {tuple(added.shape)} {added.dtype} of {tuple(given.shape)} {given.dtype}: it must keep both"
            )
    if list(examined.module.buffers()):
        raise KernelError("it has buffers: what it adds must depend on h alone")


def _cost(examined: ExaminedModule) -> None:
    """Parameters and FLOPs are those that the catalogue declares."""
    counted = sum(p.numel() for p in examined.module.parameters())
    if counted != examined.cost.num_parameters:
        raise KernelError(f"it has {counted} parameters, the catalogue declares {examined.cost.num_parameters}")
    flops, declared = _count_flops(examined), examined.cost.flops(examined.num_positions)
    if flops != declared:
        raise KernelError(f"it takes {flops} FLOPs for a sample, the catalogue declares {declared}")


def _gradient_flow(examined: ExaminedModule) -> None:
    """Off zero, every parameter has a finite gradient that is not all zero. The placebo has no parameter.

    The first step reaches parameters that start at zero, the second those behind them.
    """
    parameters, h = list(examined.module.parameters()), examined.random_input()
    if not parameters:
        return
    direction = torch.randn_like(h)
    for _step in range(2):
        for parameter, gradient in zip(parameters, _gradients(examined, h, direction), strict=True):
            if gradient is not None and gradient.any():
                parameter.data -= STEP * gradient / gradient.abs().max()
    named, gradients = examined.module.named_parameters(), _gradients(examined, h, direction)
    for (name, _parameter), gradient in zip(named, gradients, strict=True):
        if gradient is None or not gradient.any():
            raise KernelError(f"no gradient reaches {name}: it would never learn")
        if not gradient.isfinite().all():
            raise KernelError(f"the gradient of {name} is not finite")
    first, again = examined.module(h), examined.module(h)
    if not first.any():
        raise KernelError("it has parameters, and adds nothing whatever they are")
    if not torch.equal(first, again):
        raise KernelError("it adds something else to the same h each time")


def _extremes(examined: ExaminedModule) -> None:
    """Off zero, output and gradients stay finite where h is extreme."""
    h = examined.random_input()
    signs = torch.where(h > 0, EXTREME, -EXTREME)
    for name, given in (
        ("zeros", torch.zeros_like(h)),
        ("equal values", torch.full_like(h, EXTREME)),
        ("large values", EXTREME * h),
        ("large values of either sign", signs),
        ("tiny values", 1e-30 * h),
    ):
        given.requires_grad_()
        added = examined.module(given)
        is_finite = bool(added.isfinite().all())
        if is_finite and added.requires_grad:
            gradients = torch.autograd.grad(added.sum(), [given, *examined.module.parameters()])
            is_finite = all(bool(g.isfinite().all()) for g in gradients)
        if not is_finite:
            raise KernelError(f"{name} become values that are not finite")


def _round_trip(examined: ExaminedModule) -> None:
    """Packed as a checkpoint packs it and read back, it does the same to the bit."""
    weights = dict(examined.module.state_dict())
    packed = pack(examined.blueprint_id, examined.spec, examined.kind, examined.num_features, weights)
    again, h = load_grown(packed).build(), examined.random_input()
    if not torch.equal(again(h), examined.module(h)):
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
"""Name in certificates -> check; in this order."""


def _gradients(examined: ExaminedModule, h: Tensor, direction: Tensor) -> tuple[Tensor | None, ...]:
    loss = (examined.module(h) * direction).sum()
    return torch.autograd.grad(loss, list(examined.module.parameters()), allow_unused=True)


def _count_flops(examined: ExaminedModule) -> int:
    with torch.no_grad(), OperationMeter() as meter:
        examined.module(examined.random_input()[:1])
    return meter.flops


def _measure(examined: ExaminedModule) -> Measurement:
    h = examined.random_input().requires_grad_()
    with OperationMeter() as meter:
        added = examined.module(h)
        if added.requires_grad:
            added.sum().backward()
    with torch.inference_mode():
        median, p95 = latencies_ms(lambda: examined.module(h))
    return Measurement(
        target=examined.kind,
        num_features=examined.num_features,
        num_parameters=examined.cost.num_parameters,
        positions=examined.num_positions,
        flops=_count_flops(examined),
        batch_size=BATCH_SIZE,
        latency_p50_ms=median,
        latency_p95_ms=p95,
        peak_memory_bytes=meter.peak_bytes,
    )
