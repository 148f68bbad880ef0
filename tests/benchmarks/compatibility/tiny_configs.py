"""Small random models of the architectures of transformers, made from their config classes.

Owns the shrinking of configs with unknown fields: it reduces numbers by the names of their fields, in nested configs
too, and tries several ways until one builds.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

MAX_PARAMETERS = 120_000_000  # parameters; a way of shrinking fails if the model has more

HIDDEN, HEADS, KV_HEADS, INNER, VOCABULARY, POSITIONS, IMAGE, PATCH, LAYERS = 64, 4, 2, 96, 160, 256, 64, 8, 2

WAYS = ("all", "all, each head its own keys", "no widths", "layers")
"""Ways to shrink a config, the smallest result first. Some architectures accept some numbers only."""

# Numbers by pattern of the field name; the first match wins. Widths that must agree get the same number.
_RULES: tuple[tuple[str, int], ...] = (
    (r"token_id$|_token_index$|^pad|_id$|num_labels|num_channels|in_chans|type_vocab_size|_index$", -1),
    (r"num_(key_value|kv)_heads|num_key_value|n_head_kv|num_kv", KV_HEADS),
    (r"rotary_dim|rope_dim", HIDDEN // HEADS // 2),
    (r"head_dim|kv_channels|d_kv$|attention_head_size", HIDDEN // HEADS),
    (r"(num|n)_.*heads?$|attention_heads$|^n_heads?$|num_heads|n_head$|attn_heads", HEADS),
    (r"(num|n)_.*layers?$|_layers$|^n_layers?$|layers_(count|num)|depth$|num_blocks|num_hidden_layers", LAYERS),
    (r"intermediate|ffn|inner_dim|n_inner|mlp_dim|d_ff|feed_?forward.*(size|dim)", INNER),
    (r"num_(local_)?experts$|n_routed_experts|num_experts$|moe_num_experts", 4),
    (r"experts_per_tok|moe_topk|top_k|num_selected|moe_k$|n_group|topk_group", 2),
    (r"vocab_size|vocab$", VOCABULARY),
    (r"max_position|n_positions|max_seq|n_ctx|max_source|max_target|context_length$", POSITIONS),
    (r"^(hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|embedding_size|emb_dim|width|model_dim|n_embed)$", HIDDEN),
    (r"(hidden_size|d_model|embed_dim|hidden_dim|projection_dim|embedding_size|proj_dim|word_embed)", HIDDEN),
    (r"image_size|img_size", IMAGE),
    (r"patch_size", PATCH),
    (r"q_lora_rank|kv_lora_rank|rope_head_dim|nope_head_dim|v_head_dim", 16),
)


def tiny_models(config_class: Any) -> tuple[Callable[[], nn.Module], ...]:
    """Functions that build a small model of this architecture, smallest first; each raises if it fails."""
    return tuple(partial(_build, config_class, thoroughness) for thoroughness in WAYS)


def _build(config_class: Any, thoroughness: str) -> nn.Module:
    from transformers import AutoModel

    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModel.from_config(shrunk(config_class, thoroughness)).parameters())
    if count > MAX_PARAMETERS:
        raise RuntimeError(f"{count:,} parameters after shrinking")
    return AutoModel.from_config(shrunk(config_class, thoroughness))  # type: ignore[no-any-return]


def shrunk(config_class: Any, thoroughness: str) -> Any:
    """A small config of this class."""
    return config_class(**_fields(config_class(), thoroughness))


def _fields(config: Any, thoroughness: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    taken = inspect.signature(type(config).__init__).parameters
    kept: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            kept[name] = type(value)(**_fields(value, thoroughness))
        elif name in taken and not name.startswith("_"):
            kept[name] = _smaller(name, value, config, thoroughness)
    kept.pop("transformers_version", None)
    kept.pop("id2label", None)
    kept.pop("label2id", None)
    return {name: value for name, value in kept.items() if value is not None or taken[name].default is not None}


def _smaller(name: str, value: Any, config: Any, thoroughness: str) -> Any:
    depth = getattr(config, "num_hidden_layers", None)
    if isinstance(value, list | tuple) and value and depth == len(value) and depth > LAYERS:
        others = [v for v in value if v != value[0]]
        return [value[0], (others or value)[-1]]  # one layer of each of two kinds
    if isinstance(value, list | tuple) and re.search(r"depths|num_layers|layers$", name):
        return type(value)(min(1, v) if isinstance(v, int) else v for v in value)
    if isinstance(value, dict) and "mrope_section" in value:  # shares of half the width of a head
        sections = [s * HIDDEN // HEADS // 2 // sum(value["mrope_section"]) for s in value["mrope_section"]]
        return {**value, "mrope_section": sections} if thoroughness.startswith("all") else value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, small in _RULES:
        if re.search(pattern, name):
            if small == KV_HEADS and thoroughness == WAYS[1] and "kv" in pattern:
                return min(value, HEADS)
            if small < 0:
                return value if value < VOCABULARY else KV_HEADS  # token ids must be within the vocabulary
            if thoroughness == "layers" and small not in (LAYERS, VOCABULARY):
                return value
            if thoroughness == "no widths" and small in (HIDDEN, INNER, HEADS, KV_HEADS, IMAGE, PATCH):
                return value
            return min(value, small) if value > 0 else value
    return value


def inputs_by_name(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Candidate calls of a model of transformers, by the parameter names of its forward."""
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = max(8, min(int(getattr(text, "vocab_size", None) or 100), 100))
    tokens = torch.randint(4, vocabulary, (2, 8))
    every: dict[str, Any] = {}
    if "input_ids" in takes:
        every["input_ids"] = tokens
    if "attention_mask" in takes and "input_ids" in takes:
        every["attention_mask"] = torch.ones_like(tokens)
    if "decoder_input_ids" in takes:
        every["decoder_input_ids"] = tokens.clone()
    if "bbox" in takes:
        every["bbox"] = torch.tensor([1, 2, 30, 40]).expand(2, 8, 4).clone()
    if "return_dict" in takes:
        every["return_dict"] = True
    if "input_ids" in every:
        yield (), dict(every)
    for images in _images(config, takes):
        if "input_ids" not in takes or "decoder" not in str(takes):
            yield (), images
        yield (), {**every, **images}
    for sounds in _sounds(config, takes):
        yield (), {**every, **sounds} if "input_ids" not in every else sounds
        yield (), {**sounds, **{k: v for k, v in every.items() if k.startswith("decoder")}}


def _images(config: Any, takes: Any) -> Iterator[dict[str, Any]]:
    if "pixel_values" not in takes:
        return
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(vision, "image_size", None) or getattr(config, "image_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    channels = int(getattr(vision, "num_channels", None) or 3)
    for side in dict.fromkeys(s for s in (size, 64, 128, 224) if isinstance(s, int)):
        yield {"pixel_values": torch.rand(2, channels, side, side)}
    frames = getattr(config, "num_frames", None)
    if isinstance(frames, int) and isinstance(size, int):
        yield {"pixel_values": torch.rand(2, frames, channels, size, size)}


def _sounds(config: Any, takes: Any) -> Iterator[dict[str, Any]]:
    if "input_values" in takes:
        yield {"input_values": torch.randn(2, 4000)}
        yield {"input_values": torch.randn(2, 1, 4000)}
        bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
        if bins and length:
            yield {"input_values": torch.randn(2, length, bins)}
    if "input_features" in takes:
        bins = int(getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80)
        positions = getattr(config, "max_source_positions", None)
        for length in (2 * positions if positions else 128, 128):
            yield {"input_features": torch.randn(2, bins, length)}
            yield {"input_features": torch.randn(2, length, bins)}
    if "past_values" in takes:
        length = int(getattr(config, "context_length", None) or 32)
        channels = int(getattr(config, "num_input_channels", None) or 1)
        yield {"past_values": torch.randn(2, length, channels)}
        yield {"past_values": torch.randn(2, length)}
