"""Readings: the statistics of all layers of one sampled step, taken on the device, chunk by chunk.

Owns the arithmetic from samples to numbers on the host. Seeds are never looped over on the device:
channels are reduced first, layer by layer, then all chunks of all layers by one segment reduction.
Invariant: nothing here waits for the device but ``Reading.chunks``.

C: channels read of a layer. P: positions read. K: chunks (one for each seed) of all layers.
R, P': channels of a chunk, and positions, that the rank is taken of.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from esper.kasmina.samples import GradientSample, chunk_lengths, sample_output, spread_channels

RANK_CHANNELS, RANK_POSITIONS = 16, 128
"""Most channels of a chunk, and positions, whose covariance is taken: a small product of matrices a layer."""


@dataclass(frozen=True, slots=True)
class ChunkStatistics:
    """What was measured of one chunk; NaN where it was not finite, None where it was not taken."""

    mean: float
    std: float
    dead_ratio: float
    gradient_norm: float | None
    effective_rank: float | None


@dataclass(frozen=True, slots=True, eq=False)
class OutputStatistics:
    """One layer's output, channel by channel: all that is kept of it.

    Shapes: ``means``, ``variances`` and ``tops`` (the greatest value) (C,); ``lengths`` (S,), the
    channels of each chunk; ``rank_sample`` (S, R, P'), None where no rank can be told.
    """

    means: Tensor
    variances: Tensor
    tops: Tensor
    lengths: Tensor
    rank_sample: Tensor | None


@torch.no_grad()
def measure_output(h: Tensor, channel_dim: int, num_seeds: int) -> OutputStatistics:
    """The statistics of an output: see ``sample_output`` for what of it is read."""
    sample = sample_output(h, channel_dim, num_seeds)
    x, dim, step, num_features = sample.values, sample.positions_dim, sample.channel_step, h.shape[channel_dim]
    means = x.mean(dim, keepdim=True)
    rank_sample = None
    channels, count = spread_channels(num_features, num_seeds, step, RANK_CHANNELS, x.device)
    if count > 1 and sample.num_positions > 1:
        rank_sample = sample.channels(channels, RANK_POSITIONS).reshape(num_seeds, count, -1)
    return OutputStatistics(
        means=means.flatten(),
        variances=(x - means).square_().mean(dim),
        tops=x.amax(dim),
        lengths=chunk_lengths(num_features, num_seeds, step, x.device),
        rank_sample=rank_sample,
    )


class Reading:
    """Numbers under way from one device to the host, of the layers that are on it."""

    def __init__(
        self, outputs: Mapping[str, OutputStatistics], gradients: Mapping[str, Sequence[GradientSample]]
    ) -> None:
        """Launch it. ``gradients`` has each layer's parameters that have a gradient."""
        self._num_seeds = {layer_id: len(o.lengths) for layer_id, o in outputs.items()}
        self._scales = {layer_id: [g.scales for g in gradients.get(layer_id, ())] for layer_id in outputs}
        self._ranked, ranks = _rank_sums(outputs)
        parts = [
            *_chunk_moments(tuple(outputs.values())),
            *_gradient_sums(gradients.get(i, ()) for i in outputs),
            *ranks,
        ]
        self._copy = _HostCopy(torch.cat(parts))

    @property
    def is_done(self) -> bool:
        """Whether the numbers are on the host."""
        return self._copy.is_done

    def chunks(self) -> dict[str, tuple[ChunkStatistics, ...]]:
        """Each layer's chunks, in the order of its seeds; waits for the device until ``is_done``."""
        numbers = iter(self._copy.wait())
        means, deads, variances = (self._take(numbers) for _statistic in range(3))
        norms = {layer_id: self._norms(layer_id, numbers) for layer_id in self._num_seeds}
        ranks = {layer_id: _ranks(numbers, self._num_seeds[layer_id]) for layer_id in self._ranked}
        return {
            layer_id: tuple(
                ChunkStatistics(
                    mean=means[layer_id][n],
                    std=math.sqrt(variances[layer_id][n]),
                    dead_ratio=deads[layer_id][n],
                    gradient_norm=norms[layer_id][n],
                    effective_rank=ranks[layer_id][n] if layer_id in ranks else None,
                )
                for n in range(count)
            )
            for layer_id, count in self._num_seeds.items()
        }

    def _take(self, numbers: Iterator[float]) -> dict[str, list[float]]:
        return {layer_id: list(islice(numbers, count)) for layer_id, count in self._num_seeds.items()}

    def _norms(self, layer_id: str, numbers: Iterator[float]) -> Sequence[float | None]:
        squares = [0.0] * self._num_seeds[layer_id]
        for scales in self._scales[layer_id]:
            squares = [s + scale * next(numbers) for s, scale in zip(squares, scales, strict=True)]
        return [math.sqrt(s) for s in squares] if self._scales[layer_id] else [None] * len(squares)


def _chunk_moments(outputs: Sequence[OutputStatistics]) -> tuple[Tensor, Tensor]:
    """Means and dead ratios (2K,), then variances (K,).

    The variance of a chunk is that within its channels plus that of their means: no difference of
    large sums.
    """
    means, lengths = torch.cat([o.means for o in outputs]), torch.cat([o.lengths for o in outputs])
    is_dead = (torch.cat([o.tops for o in outputs]) <= 0.0).to(torch.float32)
    first = _segments("mean", torch.cat([means, is_dead]), torch.cat([lengths, lengths]))
    centres = first[: len(lengths)].repeat_interleave(lengths, output_size=len(means))
    within = torch.cat([o.variances for o in outputs])
    return first, _segments("mean", within + (means - centres).square(), lengths)


def _gradient_sums(layers: Iterable[Sequence[GradientSample]]) -> Iterator[Tensor]:
    """Sums of squares, chunk by chunk, parameter by parameter, layer by layer; nothing where there is no gradient."""
    samples = [sample for layer in layers for sample in layer]
    if samples:
        squares = torch.cat([s.norms for s in samples]).square()
        yield _segments("sum", squares, torch.cat([s.lengths for s in samples]))


def _rank_sums(outputs: Mapping[str, OutputStatistics]) -> tuple[list[str], list[Tensor]]:
    """Which layers have a rank, and for those of one shape together 1 / PR, flat: see docs/health.md.

    PR = (tr M)^2 / tr(M^2) for the covariance M of a chunk's channels; with M / tr M in place of M,
    nothing overflows.
    """
    by_shape: dict[torch.Size, dict[str, Tensor]] = defaultdict(dict)
    for layer_id, output in outputs.items():
        if output.rank_sample is not None:
            by_shape[output.rank_sample.shape][layer_id] = output.rank_sample
    sums = []
    for group in by_shape.values():
        x = torch.cat(list(group.values()))
        x = x - x.mean(2, keepdim=True)
        covariance = _products(x)
        trace = x.square().sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        sums.append((covariance / trace[:, None, None]).square().sum((1, 2)))
    return [layer_id for group in by_shape.values() for layer_id in group], sums


def _products(x: Tensor) -> Tensor:
    """x x^T for each matrix, at full precision: the caller may be under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x, x.transpose(1, 2))


def _ranks(numbers: Iterator[float], count: int) -> list[float]:
    return [1.0 / n if n else 0.0 for n in islice(numbers, count)]  # 0: nothing varies


def _segments(reduction: str, values: Tensor, lengths: Tensor) -> Tensor:
    """Neighbours reduced, ``lengths`` at a time. ``unsafe``: its check of the lengths would wait for the device."""
    return torch.segment_reduce(values, reduction, lengths=lengths, unsafe=True)


class _HostCopy:
    """One vector on its way to the host, through pinned memory from a CUDA device."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.Event(values.device)
            self._event.record(torch.cuda.current_stream(values.device))

    @property
    def is_done(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
