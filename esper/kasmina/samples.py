"""Bounded samples: which values of a layer's output and of its gradients a health signal reads.

Owns the choice of values, no statistic of them. The choice is a function of shapes alone, so two
runs read the same places; and it is bounded, so what a sampled step costs does not grow with the
batch or the model's width. What is small is read whole.

N: batch. F: features (channels). C: channels read. P: positions read, over batch and places.
S: seeds. W: values of one run.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

OUTPUT_VALUES = 8_192
"""Most values that are read of one output."""

LEAST_POSITIONS = 16
"""Channels are left out only where so many positions of all of them would be too much: with fewer, a
channel that is merely seldom positive would count as dead."""

LEAST_PLACES = 4
"""An axis other than the batch is thinned to this before the batch is: samples differ more than places do."""

GRADIENT_VALUES = 32_768
"""Most values that are read of one parameter's gradient, give or take LEAST_RUNS."""

RUN_VALUES = 64
"""A large gradient is read in runs of neighbours: single values would cost a cache line each."""

LEAST_RUNS = 4
"""Of each seed's chunk, however many seeds there are."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputSample:
    """A copy of what is read of an output, as float32: (P, C) where ``positions_dim`` is 0, (C, P) where it is 1.

    Channel c of the sample is channel ``channel_step`` * c of the output's ``num_features``.
    """

    values: Tensor
    positions_dim: int
    channel_step: int
    num_features: int
    num_seeds: int

    @property
    def shape(self) -> tuple[torch.Size, int, int, int, int]:
        """Equal for samples that can be measured together, side by side."""
        return self.values.shape, self.positions_dim, self.channel_step, self.num_features, self.num_seeds


def sample_output(h: Tensor, channel_dim: int, num_seeds: int) -> OutputSample:
    """The values that are read of an output with at least one value.

    Args:
        h: real or integer, any strides. (..., F, ...), with F at ``channel_dim``, counted from the end.
        channel_dim: negative.
        num_seeds: at most F; some channel of each seed's chunk is read.
    """
    num_features = h.shape[channel_dim]
    sizes = (*h.shape[: h.ndim + channel_dim], *h.shape[h.ndim + channel_dim + 1 :])
    channel_step, steps = _grid(num_features, sizes, num_seeds)
    taken = [slice((step - 1) // 2, None, step) for step in steps]  # from the middle of the first step: not the border
    taken.insert(h.ndim + channel_dim, slice(None, None, channel_step))
    view = h.detach()[tuple(taken)]
    if h.stride(channel_dim) == 1:
        order, positions_dim = view.movedim(channel_dim, -1), 0
    else:
        order, positions_dim = view.movedim(channel_dim, 0), 1
    copied = order.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    values = copied.reshape(-1, order.shape[-1]) if positions_dim == 0 else copied.reshape(order.shape[0], -1)
    return OutputSample(values, positions_dim, channel_step, num_features, num_seeds)


@lru_cache(maxsize=4096)
def _grid(num_features: int, sizes: tuple[int, ...], num_seeds: int) -> tuple[int, tuple[int, ...]]:
    """The step along the channels, and along each other axis; at most OUTPUT_VALUES values lie on the grid."""
    wished = -(-num_features * min(math.prod(sizes), LEAST_POSITIONS) // OUTPUT_VALUES)
    channel_step = min(wished, num_features // num_seeds)
    most = max(1, OUTPUT_VALUES // -(-num_features // channel_step))
    steps = [1] * len(sizes)
    counts = list(sizes)
    while math.prod(counts) > most:
        places = range(1, len(sizes))
        widest = max(places, key=lambda n: counts[n], default=0)
        thinned = widest if counts[widest] > LEAST_PLACES else max(range(len(sizes)), key=lambda n: counts[n])
        steps[thinned] *= 2
        counts[thinned] = -(-sizes[thinned] // steps[thinned])
    return channel_step, tuple(steps)


def chunk_bounds(num_features: int, num_seeds: int) -> tuple[int, ...]:
    """Where the seeds' chunks of F channels begin, and F: those of ``torch.tensor_split``."""
    small, num_large = divmod(num_features, num_seeds)
    return tuple(n * small + min(n, num_large) for n in range(num_seeds + 1))


@lru_cache(maxsize=4096)
def chunk_lengths(num_features: int, num_seeds: int, channel_step: int, device: torch.device) -> Tensor:
    """How many of the channels 0, step, 2 step... lie in each chunk: (S,) int64."""
    first = [-(-bound // channel_step) for bound in chunk_bounds(num_features, num_seeds)]
    return _on(device, [end - begin for begin, end in pairwise(first)])


@lru_cache(maxsize=4096)
def spread_channels(
    num_features: int, num_seeds: int, channel_step: int, most: int, device: torch.device
) -> tuple[Tensor, int]:
    """Evenly spaced channels of a sample, as many in each chunk: (S * n,) int64, and n <= most."""
    first = [-(-bound // channel_step) for bound in chunk_bounds(num_features, num_seeds)]
    count = min([most, *(end - begin for begin, end in pairwise(first))])
    index = [begin + n * (end - begin) // count for begin, end in pairwise(first) for n in range(count)]
    return _on(device, index), count


@dataclass(frozen=True, slots=True, eq=False)
class GradientSample:
    """Norms of parts of a gradient, chunk after chunk.

    A chunk's squared norm is the sum of the squares of its ``lengths`` parts, times its ``scales``.
    """

    norms: Tensor
    lengths: Tensor
    scales: tuple[float, ...]


def sample_gradient(gradient: Tensor, num_seeds: int, *, channels_last: bool = False) -> GradientSample:
    """What is read of one parameter's gradient: all of a small one, an even sample of a large one.

    A large one is read whole where its memory has gaps or its channels are not outermost in it.

    Args:
        gradient: dense, with its F channels along the first axis; along the last with ``channels_last``.
    """
    num_features = gradient.shape[-1 if channels_last else 0]
    every = chunk_lengths(num_features, num_seeds, 1, gradient.device)
    if channels_last:
        rows = gradient.reshape(-1, num_features)
        step = min(len(rows), -(-gradient.numel() // GRADIENT_VALUES) | 1)  # odd: heads have even widths
        read = rows[(step - 1) // 2 :: step]
        norms = read.to(torch.float32).square().sum(0).sqrt()
        return GradientSample(norms, every, (len(rows) / len(read),) * num_seeds)
    smallest_chunk = num_features // num_seeds * (gradient.numel() // num_features)
    if gradient.numel() > GRADIENT_VALUES and smallest_chunk >= 2 * RUN_VALUES:  # so it has a run of its own
        dense = gradient.permute(0, *sorted(range(1, gradient.ndim), key=gradient.stride, reverse=True))
        if dense.is_contiguous():
            index, lengths, scales = _runs(num_features, gradient.numel(), num_seeds, gradient.device)
            whole = gradient.numel() // RUN_VALUES * RUN_VALUES
            runs = dense.view(-1)[:whole].view(-1, RUN_VALUES).index_select(0, index)
            return GradientSample(_row_norms(runs), lengths, scales)
    rows = gradient.reshape(num_features, -1)
    return GradientSample(_row_norms(rows), every, (1.0,) * num_seeds)


def _row_norms(rows: Tensor) -> Tensor:
    if rows.shape[1] == 1:  # a bias: the sign is of no matter, all are squared
        return rows[:, 0].to(torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms


@lru_cache(maxsize=4096)
def _runs(
    num_features: int, num_values: int, num_seeds: int, device: torch.device
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Which runs of W values are read, how many in each chunk, and how many values one of them stands for."""
    row = num_values // num_features
    index, lengths, scales = [], [], []
    for begin, end in pairwise(chunk_bounds(num_features, num_seeds)):
        mine = sorted(_spread(-(-begin * row // RUN_VALUES), end * row // RUN_VALUES, num_seeds))
        index += mine
        lengths.append(len(mine))
        scales.append((end - begin) * row / (len(mine) * RUN_VALUES))
    return _on(device, index), _on(device, lengths), tuple(scales)


def _spread(begin: int, end: int, num_seeds: int) -> set[int]:
    """One place in each of equal parts of begin..end-1, at random: regular ones could fall in step with the rows."""
    count = max(LEAST_RUNS, GRADIENT_VALUES // (RUN_VALUES * num_seeds))
    chance = random.Random(0)  # the same places each time
    return {begin + int((n + chance.random()) / count * (end - begin)) for n in range(count)}


def _on(device: torch.device, numbers: list[int]) -> Tensor:
    """Whole numbers on a device; from pinned memory, since a copy from other memory would wait for the device."""
    found = torch.tensor(numbers)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
