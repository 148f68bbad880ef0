"""HostFace: what makes a MorphableModel look like the model inside it.

Owns calls, attributes, parameters, buffers, state_dict, modes and moves to devices. Invariant:
names and keys are the plain model's; what has grown is under ``kasmina.`` and in no state_dict.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from torch import Tensor, nn

from esper.errors import ContractError
from esper.kasmina.layer import KasminaLayer
from esper.kasmina.seeds import AwakeSeed, Mode


class HostFace(nn.Module):
    """The part of a MorphableModel that stands for ``host``.

    Attributes:
        awake: the seeds that hold a module, in joining order.
        layers: qualified name -> handle.
    """

    host: nn.Module
    awake: dict[tuple[str, int], AwakeSeed]
    layers: Mapping[str, KasminaLayer]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grad_scaler": None}  # a copy trains by itself, with a scaler of its own

    def __setattr__(self, name: str, value: Any) -> None:
        """Own attributes stay here; what only the host has is set there.

        Raises:
            ContractError: a module that holds seeds would be replaced.
        """
        host = self.__dict__.get("_host")
        is_own = host is None or name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        if is_own or not self.__dict__.get("_is_made") or not hasattr(host, name):
            super().__setattr__(name, value)
            return
        replaced = getattr(host, name)
        if isinstance(replaced, nn.Module) and replaced is not value:
            inside = {id(m) for m in replaced.modules()}
            if any(id(handle.module) in inside for handle in self.layers.values()):
                raise ContractError(
                    f"{name} holds seeds and cannot be replaced: do it before wrap(), or unwrap() first"
                )
        setattr(host, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward."""
        return self._host(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's state_dict, whatever has grown."""
        return self.host.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a plain model's state_dict."""
        return self.host.load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """For what holds this model (DDP, an average): the keys are the plain model's there, too."""
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}host.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The host's parameters under their own names, then those of seeds that are in its output, as they joined.

        A seed in TRAINING is not among them, so that clipping the norm of these leaves the host's
        step as it is without the seed; ``named_seed_parameters`` has them all. Without ``recurse``
        there are none: the model itself holds no parameter. DDP asks module by module, so that it
        reduces the host's gradients and leaves those of seeds to ``Replicas``.
        """
        if not recurse:
            return
        yield from self.host.named_parameters(prefix, recurse, remove_duplicate)
        for key, seed in self.__dict__.get("awake", {}).items():
            if seed.mode is Mode.BLENDED:
                for name, parameter in named_parameters_of(key, seed):
                    yield f"{prefix}{'.' if prefix else ''}{name}", parameter

    def named_seed_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of all seeds that hold a module, whether they take part or not."""
        for key, seed in self.awake.items():
            yield from named_parameters_of(key, seed)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those of seeds in TRAINING too."""
        super().zero_grad(set_to_none)
        for seed in self.awake.values():
            seed.module.zero_grad(set_to_none)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The host's buffers under their own names; seeds have none. Without ``recurse`` there are none."""
        if recurse:
            yield from self.host.named_buffers(prefix, recurse, remove_duplicate)

    def train(self, mode: bool = True) -> Self:
        """The host's mode, for grown seeds too."""
        super().train(mode)
        for seed in self.awake.values():
            seed.module.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (layer_id, _seed_id), seed in self.awake.items():
            seed.module._apply(fn)  # type: ignore[no-untyped-call]
            seed.to_device(self.layers[layer_id].like.device)
        return self


def named_parameters_of(key: tuple[str, int], seed: AwakeSeed) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of one seed, under the names that they have in its model."""
    layer_id, seed_id = key
    for name, parameter in seed.module.named_parameters():
        yield f"kasmina.{layer_id}.{seed_id}.{name}", parameter
