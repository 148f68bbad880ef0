"""Seeds by the other method, for comparison only: a wrapping module takes the layer's place."""

from typing import Any


def wrap_by_replacement(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError
