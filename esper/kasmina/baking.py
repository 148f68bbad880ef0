"""Out of Kasmina again: ``unwrap`` gives the plain model back, ``bake`` a plain model that keeps what has grown.

A layer with fossilized seeds becomes, where it stands, a layer of the same class that has the
seeds' modules in its submodule ``grown`` and adds them up: h_0 = host(x), h_n = h_(n-1) + s_n(h_(n-1)).
No handle, breaker or stage is left. Keys of the plain model stay; those of ``grown`` come to them,
``fc1.grown.0.weight`` beside ``fc1.weight``, so one baked model's state_dict loads into another's.

Both take the seeds out of the MorphableModel that they are given: it is all dormant afterwards.
"""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from esper.errors import ContractError
from esper.kasmina.bypass import close_fast_paths, fast_path_owners
from esper.kasmina.hosts import output_of
from esper.kasmina.layer import plain_class
from esper.kasmina.seeds import AwakeSeed, Mode
from esper.schemas.enums import BreakerState, SeedStage

if TYPE_CHECKING:
    from esper.kasmina.model import MorphableModel

GROWN = "grown"
_grown_classes: dict[type[nn.Module], type[nn.Module]] = {}


def unwrap(model: "MorphableModel", optimizer: Optimizer | None = None) -> nn.Module:
    """The plain model, every module of the class that it had. Seeds under way are dropped.

    Their parameters leave ``optimizer``.

    Raises:
        ContractError: a seed is fossilized, and the model would not be the same without it.
    """
    for seed in model.seeds_not_dormant():
        if seed.stage is SeedStage.FOSSILIZED:
            raise ContractError(f"seed {seed.layer_id}:{seed.seed_id} is fossilized: bake() keeps it, unwrap() cannot")
    return model.release(optimizer)


def bake(model: "MorphableModel", optimizer: Optimizer | None = None) -> nn.Module:
    """The model with its fossilized seeds as plain modules: the same output, to the bit.

    Their parameters are the same objects, so an optimizer that has them goes on. Seeds that do
    not take part in the output yet are dropped; their parameters leave ``optimizer``.

    Raises:
        ContractError: a seed takes part and is not fossilized; the breaker of one is not closed; a
            layer has an attribute of the name ``grown`` already.
    """
    grown = {handle.layer_id: _fossils(handle.layer_id, handle.awake) for handle in model.layers.values()}
    for layer_id, seeds in grown.items():
        module = model.layers[layer_id].module
        if seeds and hasattr(module, GROWN) and not _has_grown(module):
            raise ContractError(f"{layer_id} has an attribute {GROWN!r} of its own: it cannot be baked")
    layers = [(model.layers[layer_id].module, seeds) for layer_id, seeds in grown.items() if seeds]
    plain = model.release(optimizer, keep=tuple(s for _module, seeds in layers for s in seeds))
    for module, seeds in layers:
        _add(module, [seed.module for seed in seeds])
    close_fast_paths(fast_path_owners(plain), [module for module, _seeds in layers], for_good=True)
    return plain


def _fossils(layer_id: str, awake: dict[int, AwakeSeed]) -> list[AwakeSeed]:
    found = []
    for seed_id, seed in awake.items():
        if seed.stage is SeedStage.FOSSILIZED:
            if seed.breaker.state is not BreakerState.CLOSED:
                raise ContractError(f"seed {layer_id}:{seed_id} is fossilized and fails: its breaker is not closed")
            found.append(seed)
        elif seed.mode is Mode.BLENDED:
            raise ContractError(f"seed {layer_id}:{seed_id} is {seed.stage}: fossilize or cull it before bake()")
    return found


def _has_grown(module: nn.Module) -> bool:
    own = vars(module).get("forward")
    is_own = any(isinstance(forward, _GrownForward) for forward in (own, getattr(own, "plain", None)))
    return is_own or plain_class(module) in _grown_classes.values()


def _add(module: nn.Module, seeds: list[nn.Module]) -> None:
    if _has_grown(module):  # it was baked before, wrapped again, and has grown more
        module.get_submodule(GROWN).extend(seeds)  # type: ignore[operator]  # torch types it as any module
        return
    module.add_module(GROWN, nn.ModuleList(seeds))
    if "forward" in vars(module):  # somebody's own forward hides the class's
        object.__setattr__(module, "forward", _GrownForward(module, vars(module)["forward"]))
    else:
        module.__class__ = _grown_class(type(module))


def _grown_output(module: nn.Module, returned: Any) -> Any:
    h = output_of(returned)
    for grown in getattr(module, GROWN):
        h = h + grown(h).to(h.dtype)
    return (h, *returned[1:]) if isinstance(returned, tuple) else h


class _GrownForward:
    """A forward that was set on one module, with what has grown added."""

    def __init__(self, module: nn.Module, plain: Any) -> None:
        self.module, self.plain = module, plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _grown_output(self.module, self.plain(*args, **kwargs))


def _grown_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _grown_classes:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _grown_output(self, plain.forward(self, *args, **kwargs))

        def reduce(self: nn.Module, protocol: Any) -> Any:  # pickle could not find the class by name
            return _new_grown, (plain,), *object.__reduce_ex__(self, protocol)[2:]

        names = {"__module__": __name__, "__qualname__": f"Grown{plain.__name__}", "__doc__": plain.__doc__}
        body = {**names, "forward": forward, "__reduce_ex__": reduce}
        _grown_classes[plain] = type(f"Grown{plain.__name__}", (plain,), body)
    return _grown_classes[plain]


def _new_grown(plain: type[nn.Module]) -> nn.Module:
    cls = _grown_class(plain)
    return cls.__new__(cls)
