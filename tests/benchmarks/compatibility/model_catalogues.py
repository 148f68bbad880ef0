"""Third-party models of torchvision, timm and transformers, each with small inputs.

Owns how a model of each catalogue is built with random weights, and its inputs. Nothing is downloaded. If a model
rejects one input, the next candidate is tried.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
BATCH = 2  # batch norm over 1x1 maps needs more than one sample


MAX_TIMM_PARAMETERS = 60_000_000
"""Larger models of timm are scaled versions of smaller ones and take minutes each; they are not run."""


class TooLarge(Exception):
    """A model that is skipped for its size."""


@dataclass(frozen=True)
class Case:
    """One model. ``builds`` are ways to build it, ``inputs`` returns candidate calls, cheapest first."""

    catalogue: str
    name: str
    family: str
    builds: tuple[Callable[[], nn.Module], ...]
    inputs: Callable[[nn.Module], Iterator[Inputs]]
    must_be_refused: bool = False


def cases(catalogue: str) -> list[Case]:
    """All models of one catalogue, by name."""
    return {"torchvision": torchvision_cases, "timm": timm_cases, "transformers": transformers_cases}[catalogue]()


# -- torchvision ------------------------------------------------------------------------------


def torchvision_cases() -> list[Case]:
    """All 121 models; the quantized ones also as the float models that they derive from."""
    from torchvision.models import list_models

    found = []
    for name in list_models():
        family = _torchvision_family(name)
        if family == "quantized":
            found.append(_torchvision_case(name, family, quantize=True))
            found.append(_torchvision_case(name, "quantizable", quantize=False))
        else:
            found.append(_torchvision_case(name, family, quantize=None))
    return found


def _torchvision_family(name: str) -> str:
    from torchvision.models import get_model_builder

    place = get_model_builder(name).__module__.removeprefix("torchvision.models").lstrip(".").split(".")
    known = ("detection", "segmentation", "video", "optical_flow", "quantization")
    first = place[0] if place[0] in known else "classification"
    return "quantized" if first == "quantization" else first


def _torchvision_case(name: str, family: str, *, quantize: bool | None) -> Case:
    from torchvision.models import get_model, get_model_builder

    takes = inspect.signature(get_model_builder(name)).parameters

    def build() -> nn.Module:
        options: dict[str, Any] = {"weights": None}
        if "weights_backbone" in takes:
            options["weights_backbone"] = None
        if family == "classification" and name.startswith("vit_"):
            options["image_size"] = 56 if "14" in name else 64
        if family == "detection" and not name.startswith("ssd"):
            options |= {"min_size": 96, "max_size": 160}  # otherwise they scale every image up to 800 pixels
        if quantize is not None:
            options["quantize"] = quantize
        if name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
            options["init_weights"] = False
        return get_model(name, **options)

    def inputs(_model: nn.Module) -> Iterator[Inputs]:
        if family == "detection":
            images = [torch.rand(3, 96, 96) for _n in range(BATCH)]
            boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [20.0, 30.0, 80.0, 90.0]])
            target: dict[str, Tensor] = {"boxes": boxes, "labels": torch.tensor([1, 1])}
            if "mask" in name:
                target["masks"] = torch.ones(2, 96, 96, dtype=torch.uint8)
            if "keypoint" in name:
                target["keypoints"] = torch.tensor([30.0, 40.0, 1.0]).expand(2, 17, 3).clone()
            yield (images, [target] * BATCH), {}
        elif family == "video":
            for frames, size in ((4, 64), (16, 112), (16, 224)):
                yield (torch.rand(BATCH, 3, frames, size, size),), {}
        elif family == "optical_flow":
            yield tuple(torch.rand(1, 3, 128, 128) for _n in range(2)), {}
        else:
            yield from images_of((64, 96, 224, 299) if not name.startswith("vit_") else (56 if "14" in name else 64,))

    suffix = " (float)" if quantize is False else ""
    return Case("torchvision", name + suffix, family, (build,), inputs, must_be_refused=bool(quantize))


def images_of(sizes: tuple[int, ...], channels: int = 3) -> Iterator[Inputs]:
    """Batches of square images."""
    for size in sizes:
        yield (torch.rand(BATCH, channels, size, size),), {}


# -- timm -------------------------------------------------------------------------------------


def timm_cases() -> list[Case]:
    """Every name of timm; the family is the module that defines it."""
    import timm
    from timm.models import _registry

    return [_timm_case(name, _registry._model_to_module[name]) for name in timm.list_models()]


def _timm_case(name: str, family: str) -> Case:
    def build() -> nn.Module:
        import timm

        with (
            contextlib.suppress(NotImplementedError, RuntimeError),
            torch.device("meta"),
        ):  # some read values while they are built
            count = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
            if count > MAX_TIMM_PARAMETERS:
                raise TooLarge(f"{count:,} parameters")
        return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]

    def inputs(model: nn.Module) -> Iterator[Inputs]:
        size = model.pretrained_cfg["input_size"]  # type: ignore[index]
        smaller = (64, 128) if not model.pretrained_cfg.get("fixed_input_size") else ()  # type: ignore[operator]
        yield from images_of((*smaller, size[-1]), size[0])

    return Case("timm", name, family, (build,), inputs)


# -- transformers -----------------------------------------------------------------------------


def transformers_cases() -> list[Case]:
    """Every architecture of AutoModel, built from a small random config."""
    import transformers.modeling_utils  # noqa: F401  # here once, not in the process of every model
    from tiny_configs import inputs_by_name, tiny_models
    from transformers import MODEL_MAPPING, logging

    logging.set_verbosity_error()
    return [
        Case("transformers", str(c.model_type), "transformers", tiny_models(c), inputs_by_name)
        for c in sorted(MODEL_MAPPING.keys(), key=lambda c: str(c.model_type))
    ]
