"""Readings: the statistics of all layers of one sampled step, taken on the device, chunk by chunk.

Owns the arithmetic from samples to numbers on the host. Nothing loops over seeds on the device:
channels are reduced first, layers of one shape side by side, then all chunks of all layers by one
segment reduction.
Invariant: nothing here waits for the device but ``Reading.chunks``.

G: layers of one shape. C: channels read of a layer. P: positions read. S: seeds of a layer.
K: chunks (one for each seed) of all layers.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from esper.kasmina.samples import GradientSample, OutputSample, chunk_lengths, spread_channels

RANK_CHANNELS, RANK_POSITIONS = 16, 128
"""Most channels of a chunk, and positions, whose covariance is taken: a small product of matrices a layer."""


class ChunkStatistics(NamedTuple):
    """What was measured of one chunk; NaN where it was not finite, None where it was not taken."""

    mean: float
    std: float
    dead_ratio: float
    gradient_norm: float | None
    effective_rank: float | None


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Layers whose samples have one shape, measured side by side, channel by channel.

    Shapes: ``means``, ``variances`` and ``tops`` (the greatest value) (G * C,); ``lengths`` (G * S,),
    the channels of each chunk; ``ranks`` (G * S,), the inverses, None where no rank can be told.
    """

    layer_ids: tuple[str, ...]
    num_seeds: int
    means: Tensor
    variances: Tensor
    tops: Tensor
    lengths: Tensor
    ranks: Tensor | None


class Reading:
    """Numbers under way from one device to the host, of the layers that are on it."""

    def __init__(self, outputs: Mapping[str, OutputSample], gradients: Mapping[str, Sequence[GradientSample]]) -> None:
        """Launch it. ``gradients`` has each layer's parameters that have a gradient."""
        by_shape = defaultdict(list)
        for layer_id, sample in outputs.items():
            by_shape[sample.shape].append(layer_id)
        self._groups = [_measure(tuple(ids), [outputs[i] for i in ids]) for ids in by_shape.values()]
        self._num_seeds = {layer_id: group.num_seeds for group in self._groups for layer_id in group.layer_ids}
        mine = {layer_id: gradients.get(layer_id, ()) for layer_id in self._num_seeds}
        self._scales = {layer_id: [g.scales for g in found] for layer_id, found in mine.items()}
        ranks = [group.ranks for group in self._groups if group.ranks is not None]
        self._copy = _HostCopy(torch.cat([*_chunk_moments(self._groups), *_gradient_sums(mine.values()), *ranks]))

    @property
    def is_done(self) -> bool:
        """Whether the numbers are on the host."""
        return self._copy.is_done

    def chunks(self) -> dict[str, list[ChunkStatistics]]:
        """Each layer's chunks, in the order of its seeds; waits for the device until ``is_done``."""
        numbers = iter(self._copy.wait())
        count = sum(self._num_seeds.values())
        means, deads, variances = (iter(list(islice(numbers, count))) for _statistic in range(3))
        norms = {layer_id: self._norms(layer_id, numbers) for layer_id in self._num_seeds}
        found = {}
        for group in self._groups:
            for layer_id in group.layer_ids:
                ranks = [None] * group.num_seeds if group.ranks is None else _ranks(numbers, group.num_seeds)
                found[layer_id] = [
                    ChunkStatistics(next(means), math.sqrt(next(variances)), next(deads), norm, rank)
                    for norm, rank in zip(norms[layer_id], ranks, strict=True)
                ]
        return found

    def _norms(self, layer_id: str, numbers: Iterator[float]) -> Sequence[float | None]:
        squares = [0.0] * self._num_seeds[layer_id]
        for scales in self._scales[layer_id]:
            squares = [s + scale * next(numbers) for s, scale in zip(squares, scales, strict=True)]
        return [math.sqrt(s) for s in squares] if self._scales[layer_id] else [None] * len(squares)


def _measure(layer_ids: tuple[str, ...], samples: Sequence[OutputSample]) -> _Group:
    one = samples[0]
    dim = one.positions_dim + 1
    x = torch.stack([sample.values for sample in samples])
    means, tops = x.mean(dim, keepdim=True), x.amax(dim)
    x -= means
    device = x.device
    return _Group(
        layer_ids=layer_ids,
        num_seeds=one.num_seeds,
        means=means.flatten(),
        variances=x.square().mean(dim).flatten(),
        tops=tops.flatten(),
        lengths=chunk_lengths(one.num_features, one.num_seeds, one.channel_step, device).repeat(len(samples)),
        ranks=_rank_inverses(x, one),
    )


def _rank_inverses(x: Tensor, one: OutputSample) -> Tensor | None:
    """1 / PR of every chunk: see docs/reference/health-signals.md.

    PR = (tr M)^2 / tr(M^2) for the covariance M of a chunk's channels; with M / tr M in place of M,
    nothing overflows.
    """
    channels, count = spread_channels(one.num_features, one.num_seeds, one.channel_step, RANK_CHANNELS, x.device)
    num_positions = x.shape[one.positions_dim + 1]
    if count < 2 or num_positions < 2:
        return None
    every = -(-num_positions // RANK_POSITIONS)
    if one.positions_dim == 0:
        x = x[:, ::every].index_select(2, channels).transpose(1, 2)
    else:
        x = x[:, :, ::every].index_select(1, channels)
    x = x.reshape(-1, count, x.shape[-1])
    x = x - x.mean(2, keepdim=True)
    covariance = _products(x)
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (covariance / trace[:, None, None]).square().sum((1, 2))


def _chunk_moments(groups: Sequence[_Group]) -> tuple[Tensor, Tensor]:
    """Means and dead ratios (2K,), then variances (K,).

    The variance of a chunk is that within its channels plus that of their means: no difference of
    large sums.
    """
    means, lengths = torch.cat([g.means for g in groups]), torch.cat([g.lengths for g in groups])
    is_dead = (torch.cat([g.tops for g in groups]) <= 0.0).to(torch.float32)
    first = _segments("mean", torch.cat([means, is_dead]), torch.cat([lengths, lengths]))
    centres = first[: len(lengths)].repeat_interleave(lengths, output_size=len(means))
    within = torch.cat([g.variances for g in groups])
    return first, _segments("mean", within + (means - centres).square(), lengths)


def _gradient_sums(layers: Iterable[Sequence[GradientSample]]) -> Iterator[Tensor]:
    """Sums of squares, chunk by chunk, parameter by parameter, layer by layer; nothing where there is no gradient."""
    samples = [sample for layer in layers for sample in layer]
    if samples:
        squares = torch.cat([s.norms for s in samples]).square()
        yield _segments("sum", squares, torch.cat([s.lengths for s in samples]))


def _products(x: Tensor) -> Tensor:
    """x x^T for each matrix, at full precision: the caller may be under autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return torch.bmm(x, x.transpose(1, 2))
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
