"""What a dormant layer costs by class swap (Esper) and by replacement: ratios of interleaved runs, forward and backward."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from seed_by_replacement import wrap_by_replacement
from torch import nn

import esper
from esper.kasmina.hosts import host_type

ROUNDS = 25
ROUND_S = 0.05


def encoder() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(8, 16, 64)


def residual_network() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import resnet18

    return resnet18(), torch.randn(2, 3, 64, 64)


def single_layer() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(128, 64)), torch.randn(32, 128)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'model':18} {'class swap':>26} {'replacement':>26}   of the plain model's time (80 % of rounds)")
    for make in (single_layer, encoder, residual_network):
        torch.manual_seed(0)
        plain, x = make()
        swapped = esper.wrap(copy.deepcopy(plain), is_host).host
        replaced = wrap_by_replacement(copy.deepcopy(plain), is_host)
        steps = [step_of(model, x) for model in (plain, swapped, replaced)]
        print(f"{make.__name__:18} " + " ".join(f"{text:>26}" for text in ratios(steps)))


def is_host(_name: str, module: nn.Module) -> bool:
    return host_type(module) is not None


def step_of(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).sum().backward()

    return step


def ratios(steps: list[Callable[[], None]]) -> list[str]:
    """Of all but the first to the first: median and interval."""
    began = time.perf_counter()
    steps[0]()
    repeats = max(1, round(ROUND_S / (time.perf_counter() - began)))
    taken: list[list[float]] = [[] for _step in steps]
    for _round in range(ROUNDS):
        for times, step in zip(taken, steps, strict=True):
            began = time.perf_counter()
            for _repeat in range(repeats):
                step()
            times.append(time.perf_counter() - began)
    texts = []
    for times in taken[1:]:
        found = [t / p for t, p in zip(times, taken[0], strict=True)]
        tenths = statistics.quantiles(found, n=10)
        texts.append(f"{statistics.median(found):.3f} ({tenths[0]:.3f}..{tenths[-1]:.3f})")
    return texts


if __name__ == "__main__":
    main()
