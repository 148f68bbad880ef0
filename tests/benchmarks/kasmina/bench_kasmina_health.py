"""What health signals cost on a sampled step: a layer, beside the way before, and a share of training.

The way before kept whole outputs and looped over the seeds; it is here to be compared with. Both
get the same outputs and gradients, in turn, in one run. Processor time of the thread: what else runs on
the machine is not counted, though it slows caches down. Medians, with 80 % of the rounds between.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import esper
from esper.connection.settings import LinkOptions
from esper.kasmina.health import SPREAD
from esper.kasmina.hosts import CHANNEL_DIM
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.model import MorphableModel
from esper.schemas.operational import HealthSignal

BATCH, LAYERS, SECONDS = 32, 8, 2.0
EVERY_STEPS = int(LinkOptions.model_validate({}).health_interval_steps)
LINEAR, CONV = (64, 256, 1024, 4096), ((16, 32), (64, 32), (128, 16), (256, 8), (512, 4))


def loop_over_seeds(layer: KasminaLayer, h: Tensor) -> list[HealthSignal]:
    """The way before: chunk by chunk, all values."""
    channels = h.movedim(CHANNEL_DIM[layer.kind], 0).reshape(layer.num_features, -1)
    gradient = layer.module.weight.grad.reshape(layer.num_features, -1)
    rows = []
    for part in torch.arange(layer.num_features).tensor_split(layer.num_seeds):
        chunk = channels[part]
        rows += [chunk.mean(), chunk.std(correction=0), (chunk.amax(1) <= 0).float().mean(), gradient[part].norm()]
    flat = torch.stack(rows).reshape(layer.num_seeds, 4).tolist()
    return [
        HealthSignal(
            layer_id=layer.layer_id,
            seed_id=n,
            chunk_id=n,
            epoch=0,
            health_score=(1 - dead) * std / (std + SPREAD),
            activation_mean=mean,
            activation_std=std,
            dead_ratio=dead,
            gradient_norm=norm,
        )
        for n, (mean, std, dead, norm) in enumerate(flat)
    ]


def sampled(model: MorphableModel, outputs: dict[str, Tensor]) -> None:
    """All that a sampled step does beyond training: hooks in and out, what they measure, signals."""
    model.probe.arm()
    for layer_id, h in outputs.items():
        module = model.layers[layer_id].module
        for hook in module._forward_hooks.values():
            hook(module, (), h)
    model.probe.collect(1, 0)
    model.probe.finished()


def outputs_of(model: MorphableModel, x: Tensor) -> dict[str, Tensor]:
    """One training pass: what each layer gave, and gradients in place."""
    found: dict[str, Tensor] = {}

    def keep(layer_id: str) -> Callable[..., None]:
        return lambda _module, _args, h: found.__setitem__(layer_id, h.detach().clone())

    hooks = [layer.module.register_forward_hook(keep(name)) for name, layer in model.layers.items()]
    model(x).square().mean().backward()
    for hook in hooks:
        hook.remove()
    return found


def seconds_of(*ways: Callable[[], object]) -> list[list[float]]:
    """Rounds of each way, taken in turn, for about SECONDS."""
    taken: list[list[float]] = [[] for _way in ways]
    until = time.perf_counter() + SECONDS
    while len(taken[0]) < 5 or time.perf_counter() < until:
        for times, way in zip(taken, ways, strict=True):
            began = time.thread_time()
            way()
            times.append(time.thread_time() - began)
    return taken


def spread(values: list[float], digits: int = 1) -> str:
    deciles = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):9.{digits}f} ({deciles[0]:.{digits}f}..{deciles[-1]:.{digits}f})"


def per_layer(name: str, net: nn.Module, x: Tensor) -> None:
    model = esper.wrap(net, [nn.Linear, nn.Conv2d])
    outputs = outputs_of(model, x)
    new, old = seconds_of(
        lambda: sampled(model, outputs), lambda: [loop_over_seeds(model.layers[i], h) for i, h in outputs.items()]
    )
    count = len(outputs)
    ratios = [b / a for a, b in zip(new, old, strict=True)]
    micros = [[1e6 * t / count for t in times] for times in (new, old)]
    print(f"{name:34} {spread(micros[0]):>26} {spread(micros[1]):>30} {spread(ratios):>22}", flush=True)


def share(name: str, net: nn.Module, x: Tensor, classes: int) -> None:
    model = esper.wrap(net, [nn.Linear, nn.Conv2d])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    y = torch.randint(0, classes, (len(x),))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    outputs = outputs_of(model, x)
    step()
    steps, extra = seconds_of(step, lambda: sampled(model, outputs))
    percents = [100 * e / (EVERY_STEPS * s) for s, e in zip(steps, extra, strict=True)]
    millis = 1e3 * statistics.median(steps)
    print(f"{name:34} {len(outputs):3} layers, {millis:8.2f} ms a step: {spread(percents, 2)} %", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'us a layer on a sampled step':34} {'now':>26} {'before':>30} {'times faster':>22}")
    for width in LINEAR:
        net = nn.Sequential(*[nn.Linear(width, width) for _n in range(LAYERS)])
        per_layer(f"Linear {width}, batch {BATCH}", net, torch.randn(BATCH, width))
    for channels, side in CONV:
        net = nn.Sequential(*[nn.Conv2d(channels, channels, 3, padding=1) for _n in range(LAYERS)])
        per_layer(f"Conv2d {channels}, {side}x{side}, batch {BATCH}", net, torch.randn(BATCH, channels, side, side))
    print(f"\nshare of training time, health every {EVERY_STEPS} steps (the default)")
    small = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    share("MLP 64-64-10, batch 32", small, torch.randn(BATCH, 64), 10)
    middle = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    share("MLP 784-512-512-10, batch 128", middle, torch.randn(128, 784), 10)
    try:
        from torchvision.models import resnet18
    except ImportError:
        print("resnet18: needs torchvision (the extra `catalogues`)")
        return
    resnet = resnet18(num_classes=10)
    per_layer("resnet18, 32x32, batch 32", resnet, torch.randn(BATCH, 3, 32, 32))
    share("resnet18, 32x32, batch 32", resnet18(num_classes=10), torch.randn(BATCH, 3, 32, 32), 10)


if __name__ == "__main__":
    main()
