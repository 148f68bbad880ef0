"""KasminaLayer: the handle beside one module of the model, and the seeds that are awake in it.

A dormant layer is the module itself, nothing in its path. When a seed begins to take part the
module's class is swapped for a subclass of it that blends the seeds in; when none does any more,
it is swapped back. So isinstance, ``.weight`` and state_dict stay the plain module's
(docs/design/decisions/0009).
Several seeds in one layer act in the order of their ids, each on what the one before it gave.
"""

import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from esper.errors import ContractError, NotSupportedError
from esper.kasmina.hosts import batching_of, host_type, output_of
from esper.kasmina.kernels import LoadedKernel
from esper.kasmina.seeds import AwakeSeed, Mode
from esper.schemas.enums import SeedStage

_HANDLE = "_kasmina_layer"
_handles: "WeakKeyDictionary[nn.Module, weakref.ref[KasminaLayer]]" = WeakKeyDictionary()
_awake_classes: dict[type[nn.Module], type[nn.Module]] = {}


class KasminaLayer:
    """One layer's handle.

    Attributes:
        index: its row in the arrays of state.
        awake: seed id -> seed, in the order in which they act.
        differentiable_twice: blend with ordinary operations, so that double backward works.

    Raises:
        ContractError: the module is another handle's.
        TypeError: the module cannot hold seeds.
    """

    def __init__(self, layer_id: str, index: int, module: nn.Module, seeds_per_layer: int) -> None:
        host = host_type(module)
        if host is None:
            raise TypeError(f"{type(module).__name__} cannot hold seeds")
        other = _handles.get(module)
        if other is not None and other() is not None:
            raise ContractError(
                f"{layer_id} is wrapped already: use the MorphableModel that wrap() gave, or unwrap() it first"
            )
        _handles[module] = weakref.ref(self)
        self.layer_id = layer_id
        self.index = index
        self.module = module
        self.kind = host.kind
        self.num_features = host.num_features(module)
        self.num_seeds = min(seeds_per_layer, self.num_features)
        self.awake: dict[int, AwakeSeed] = {}
        self.differentiable_twice = False

    @property
    def like(self) -> Tensor:
        """A tensor of the device and type that the layer computes with."""
        floating = (p for p in self.module.parameters() if p.is_floating_point())
        return next(floating, torch.empty(0))

    @property
    def takes_part(self) -> bool:
        """Whether a seed has to be called when the layer is."""
        return any(seed.mode is not Mode.IDLE for seed in self.awake.values())

    def wake(self, seed_id: int, kernel: LoadedKernel) -> AwakeSeed:
        """Put a kernel into a seed; the layer's output stays as it is."""
        like = self.like
        module = kernel.build().to(device=like.device, dtype=like.dtype).train(self.module.training)
        seed = self.awake[seed_id] = AwakeSeed(kernel, module, like.device, batching_of(self.module, self.kind))
        self.awake = dict(sorted(self.awake.items()))
        return seed

    def let_go(self) -> None:
        """The module may be wrapped again."""
        _handles.pop(self.module, None)

    def sleep(self, seed_id: int) -> AwakeSeed:
        """Take a seed's module out; with the last one the layer is the plain module again."""
        seed = self.awake.pop(seed_id)
        self._swap_class()
        return seed

    def follow(self, seed_id: int, stage: SeedStage, alpha: float) -> None:
        """Let an awake seed take part as this stage does, with this share."""
        self.awake[seed_id].follow(stage, alpha)
        self._swap_class()

    def blend(self, returned: Any) -> Any:
        """What the layer returns with its seeds, given what its host ``returned``.

        Raises:
            NotSupportedError: under vmap or another transform of torch.func, or torch.jit.trace.
        """
        h = output_of(returned)
        is_traced = torch.compiler.is_compiling()
        if not is_traced:
            _refuse_transforms(h)
        for seed in self.awake.values():
            h = seed.blend(h, is_traced=is_traced or self.differentiable_twice)
        return (h, *returned[1:]) if isinstance(returned, tuple) else h

    def _swap_class(self) -> None:
        module = self.module
        holder = vars(module).get(_HANDLE)
        if holder is not None and holder is not self:
            raise ContractError(f"{self.layer_id} holds a seed of another MorphableModel: wrap a model once")
        plain = plain_class(module)
        if self.takes_part and holder is None:
            object.__setattr__(module, _HANDLE, self)
            module.__class__ = _awake_class(plain)
            if "forward" in module.__dict__:  # somebody's own forward hides the class's
                object.__setattr__(module, "forward", _BlendedForward(self, module.__dict__["forward"]))
        elif not self.takes_part and holder is self:
            if type(module) is _awake_classes.get(plain):  # else somebody put a class of their own on top
                module.__class__ = plain
            object.__delattr__(module, _HANDLE)
            own = module.__dict__.get("forward")
            if isinstance(own, _BlendedForward):
                object.__setattr__(module, "forward", own.plain)


class _BlendedForward:
    """A forward that was set on one module, with the seeds blended in."""

    def __init__(self, handle: KasminaLayer, plain: Any) -> None:
        self.handle, self.plain = handle, plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handle.blend(self.plain(*args, **kwargs))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without seeds."""
    found: type[nn.Module] = getattr(type(module), "_plain_class", type(module))
    return found


def _awake_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain not in _awake_classes:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            returned = plain.forward(self, *args, **kwargs)
            handle: KasminaLayer | None = self.__dict__.get(_HANDLE)
            return returned if handle is None else handle.blend(returned)

        def reduce(self: nn.Module, protocol: Any) -> Any:  # the class itself has no name that pickle could find
            module = object.__reduce_ex__(self, protocol)
            return _new_awake, (plain,), *module[2:]

        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        body = {**names, "forward": forward, "__reduce_ex__": reduce, "_plain_class": plain}
        _awake_classes[plain] = type(plain.__name__, (plain,), body)
    return _awake_classes[plain]


def _new_awake(plain: type[nn.Module]) -> nn.Module:
    cls = _awake_class(plain)
    return cls.__new__(cls)


def _refuse_transforms(h: Tensor) -> None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # documented, but not exported
        raise NotSupportedError("torch.jit.trace does not follow awake seeds: bake() the model first")
    if torch._C._functorch.is_functorch_wrapped_tensor(h):
        raise NotSupportedError(
            "torch.func's transforms (vmap, grad, jvp) do not go through a layer with awake seeds: "
            "use torch.autograd, or bake() the model"
        )
