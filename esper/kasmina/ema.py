"""GrowingAverage: torch's AveragedModel for a model that grows; its copy grows, and shrinks, with it.

AveragedModel pairs parameters by their place. Once seeds came or went those of the copy and of the
model are not the same, and it averages the ones of one seed, or a buffer, into another's, or leaves
seeds out, without a word. Here a seed that woke enters the copy as it is, one that was given up leaves it.
Invariant: before each average the copy has the same parameters in the same order as the model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from esper.kasmina.distributed import morphable_of
from esper.kasmina.model import MorphableModel
from esper.kasmina.seeds import Mode


class GrowingAverage(AveragedModel):
    """Used as AveragedModel is. Its state_dict holds the seeds of the copy too.

    Args:
        model: from ``esper.wrap``, or DDP or torch.compile around it.
        device: where the average is kept; the model's own where it is None.
        avg_fn, multi_avg_fn, use_buffers: as torch.optim.swa_utils.AveragedModel has them.

    Raises:
        ContractError: the model holds no seeds.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[[Any, Any, Tensor | int], None] | None = None,
        use_buffers: bool = False,
    ) -> None:
        super().__init__(morphable_of(model), device, avg_fn, multi_avg_fn, use_buffers)

    @property
    def copy(self) -> MorphableModel:
        """The model that holds the average."""
        return morphable_of(self.module)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the copy: the host's, then those of its seeds."""
        return self.copy.named_parameters(f"{prefix}{'.' if prefix else ''}module", recurse, remove_duplicate)

    def update_parameters(self, model: nn.Module) -> None:
        """Grow as the model did, then average."""
        source = morphable_of(model)
        _grow_as(self.copy, source)
        super().update_parameters(source)

    def get_extra_state(self) -> dict[str, Any]:
        """The seeds of the copy, for ``state_dict``."""
        return self.copy.seed_state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``get_extra_state``."""
        self.copy.load_seed_state(state)


def _grow_as(copy: MorphableModel, source: MorphableModel) -> None:
    averaged = {life for life in _germinations(copy) if copy.awake[life[0]].mode is Mode.BLENDED}
    if _germinations(copy) != _germinations(source):
        kept = {life: dict(copy.awake[life[0]].module.state_dict()) for life in _germinations(copy)}
        for layer_id, seed_id in list(copy.awake):
            copy.uninstall(copy.layers[layer_id], seed_id, None)
        copy.held.clear()
        for life in _germinations(source):
            (layer_id, seed_id), seed = life[0], source.awake[life[0]]
            grown = copy.install(copy.layers[layer_id], seed_id, seed.kernel, None)
            grown.module.load_state_dict(kept.get(life) or seed.module.state_dict())
    copy.state.load_lists(source.state.to_lists())
    copy.held = {key: copy.held.get(key, kernel) for key, kernel in source.held.items()}
    copy.follow_all()
    for key in (life[0] for life in _germinations(source) if life not in averaged):  # not in the output until now
        copy.awake[key].module.load_state_dict(source.awake[key].module.state_dict())


def _germinations(model: MorphableModel) -> list[tuple[tuple[str, int], int]]:
    """The lives under way, in the order in which they joined: which seed, and since which step."""
    since = model.state.germinated_at_step
    return [(key, int(since[model.layers[key[0]].index, key[1]])) for key in model.awake]
