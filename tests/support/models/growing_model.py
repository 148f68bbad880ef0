"""A small model that grows, with kernels by name, for tests of Kasmina."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import esper
from esper.kasmina.kernels import LoadedKernel, build_kernel, load_kernel
from esper.kasmina.lifecycle import StageSchedule
from esper.kasmina.model import MorphableModel
from esper.schemas.assets import BlueprintSpec
from esper.schemas.enums import LayerKind, SeedStage

BOUNDARY_STEPS = 2
OPTIONS: dict[str, dict[str, float]] = {
    "low_rank": {"rank": 2},
    "bottleneck": {"expansion": 0.5},
    "residual": {"expansion": 0.5},
    "mlp": {"width": 3},
    "squeeze_excite": {"reduction": 2},
}
SCHEDULE = StageSchedule(germinated=1, training=2, grafting=2, stabilizing=1, evaluating=5, embargo=2)


class SmallNet(nn.Module):
    """A convolution and two linear layers, with in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.fc1 = nn.Linear(6 * 16, 8)
        self.fc2 = nn.Linear(8, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(self.relu(self.conv(x)).flatten(1))))


def plain(seed: int = 0) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet()


def wrapped(seed: int = 0, net: nn.Module | None = None) -> MorphableModel:
    model = esper.wrap(net or plain(seed), target_layers=[nn.Conv2d, nn.Linear])
    model.schedule, model.boundary_steps = SCHEDULE, BOUNDARY_STEPS
    return model


def loaded_kernel(
    kind: LayerKind, num_features: int, module: str = "low_rank", parameters: Mapping[str, float] | None = None
) -> LoadedKernel:
    spec = BlueprintSpec(module=module, parameters=parameters or OPTIONS.get(module, {}), targets=(kind,))
    data = build_kernel(f"{module}-test", spec, kind, num_features)
    return load_kernel(data, hashlib.sha256(data).hexdigest())


def kernel_for(model: MorphableModel, layer_id: str, module: str = "low_rank") -> LoadedKernel:
    handle = model.layers[layer_id]
    return loaded_kernel(handle.kind, handle.num_features, module)


def germinate(
    model: MorphableModel,
    layer_id: str,
    seed_id: int = 0,
    module: str = "low_rank",
    *,
    optimizer: Optimizer | None = None,
    step: int = 0,
) -> None:
    kernel = kernel_for(model, layer_id, module)
    plan = model.plan_germinate(layer_id, seed_id, kernel)
    boundary = step // model.boundary_steps
    model.apply_transition(plan, step=step, boundary=boundary, kernel=kernel, optimizer=optimizer)


def advance_to(
    model: MorphableModel,
    layer_id: str,
    seed_id: int,
    stage: SeedStage,
    *,
    train: Callable[[int], object],
    optimizer: Optimizer | None = None,
    start: int = 0,
) -> int:
    """Train across boundaries until the seed is at ``stage``. Returns the last step."""
    step = start
    while model.seed(layer_id, seed_id).stage is not stage:
        step += 1
        train(step)
        model.on_step(step)
        if step % model.boundary_steps == 0:
            for plan in model.plan_advance(step // model.boundary_steps):
                model.apply_transition(plan, step=step, boundary=step // model.boundary_steps, optimizer=optimizer)
        assert step < start + 60, f"the seed stays {model.seed(layer_id, seed_id).stage}"
    return step


def batch(n: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(size, 1, 4, 4, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def loss_of(model: nn.Module, n: int) -> Tensor:
    x, y = batch(n)
    return nn.functional.cross_entropy(model(x), y)


def train_step(model: nn.Module, optimizer: Optimizer, n: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, n)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_to(
    model: MorphableModel, optimizer: Optimizer, layer_id: str, seed_id: int, stage: SeedStage, start: int = 0
) -> int:
    """``advance_to`` with an ordinary training step."""
    return advance_to(
        model,
        layer_id,
        seed_id,
        stage,
        train=lambda n: train_step(model, optimizer, n),
        optimizer=optimizer,
        start=start,
    )


def grown(stage: SeedStage, layer_id: str = "fc1", module: str = "low_rank") -> tuple[MorphableModel, Optimizer, int]:
    """A model with one seed at ``stage``, its optimizer, and its current step."""
    model = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    germinate(model, layer_id, module=module, optimizer=optimizer)
    return model, optimizer, train_to(model, optimizer, layer_id, 0, stage)
