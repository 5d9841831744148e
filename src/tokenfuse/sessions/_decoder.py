"""The layers of a model's decoder, and which of them can be cut."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenfuse.costs import attends
from tokenfuse.errors import ConfigError, UnsupportedModelError
from tokenfuse.strategies._base import Strategy

MASKED = ("sdpa", "eager")
"""Attention implementations of transformers that take a mask for each query and key."""


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a transformers model's decoder, in order."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UnsupportedModelError(
            f"the decoder of {type(model).__name__} has no layers; expected a list of them, as "
            "transformers' decoders have"
        )
    return list(layers)


def attention_of(layer: nn.Module) -> tuple[str, Any]:
    """The attention of a decoder layer, and the name that it has there."""
    for name, module in layer.named_children():
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups"):
            return name, module
    raise UnsupportedModelError(
        f"no attention was found in a {type(layer).__name__}; expected a module with layer_idx and "
        "num_key_value_groups, as transformers has them"
    )


def refuse_unfit_cuts(model: Any, strategy: Strategy, attention: str = "plain") -> None:
    """Raise UnsupportedModelError or ConfigError where a strategy cannot act in this decoder."""
    cuts, pruning = strategy.cuts(), strategy.cache_pruning()
    if not cuts and pruning is None:
        return
    config = model.config.get_text_config()
    layers = [cut.layer for cut in cuts] + ([] if pruning is None else [pruning.layer])
    number = len(decoder_layers(model))
    for layer in layers:
        if not 1 <= layer < number:
            raise ConfigError(
                f"strategy {strategy.name} acts at layer {layer}; the decoder of "
                f"{type(model).__name__} has {number} layers; expected 1 to {number - 1}: at 0 "
                "strategies act before the LLM"
            )
    if attention == "proportional":
        raise ConfigError(
            f"strategy {strategy.name} acts inside the LLM, where attention: proportional does not "
            "follow it; expected attention: plain"
        )
    if not all(attends(config)):
        raise UnsupportedModelError(
            f"strategy {strategy.name} acts inside the LLM, and {type(model).__name__} has layers "
            "that are no attention: what they have read of a token cannot be taken back; expected "
            "a strategy that acts before the LLM"
        )
    if any(_slides(config)):
        raise UnsupportedModelError(
            f"strategy {strategy.name} acts inside the LLM, and {type(model).__name__} has layers "
            "with a sliding window, whose caches do not tell which tokens they hold; expected a "
            "strategy that acts before the LLM"
        )
    kind = config._attn_implementation
    if kind not in MASKED and "flash" not in kind:
        raise UnsupportedModelError(
            f"strategy {strategy.name} acts inside the LLM, where it shortens attention masks, and "
            f"the form of those of {kind} is not known; expected sdpa, eager or flash attention: "
            'load the model with attn_implementation="sdpa"'
        )


def _slides(config: Any) -> list[bool]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [getattr(config, "sliding_window", None) is not None]
    return [not kind.startswith("full") for kind in kinds]
