"""LLaVA 1.5: one square image per block of placeholders, 1-D rope."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters.base import PIXELS, Adapter
from tokenfuse.adapters.supply import QueriesKeys, listen
from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.strategies.base import Attention, Need
from tokenfuse.tokens import Grid, Modality

TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision towers, and how many tokens precede their patches."""


class Llava(Adapter):
    """LLaVA 1.5: CLIP or SigLIP, an MLP, and a language model with 1-D rope. Images only.

    Saliency in a CLIP tower is what the class token pays, as FasterVLM and VisionZip read it.
    """

    name: ClassVar[str] = "llava"
    supplies: ClassVar[frozenset[Need]] = frozenset({"saliency", "text"})

    @classmethod
    def matches(cls, model: Any) -> bool:
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "llava":
            return False
        base = getattr(model, "model", None)
        return config.vision_config.model_type in TOWERS and hasattr(base, "vision_tower")

    def grids(self, inputs: Mapping[str, Any], modality: Modality) -> list[Grid]:
        if modality == "video":
            raise PromptError(
                f"{PIXELS[modality]} are given, and {type(self.model).__name__} reads images only; "
                "expected pixel_values"
            )
        config = self.model.config
        option = "vision_feature_select_strategy"
        selected = inputs.get(option) or getattr(config, option)
        if TOWERS[config.vision_config.model_type] and selected == "full":
            raise UnsupportedModelError(
                "vision_feature_select_strategy is full, so that the class token stands among the "
                "patches; expected default"
            )
        side = config.vision_config.image_size // config.vision_config.patch_size
        return [(1, side, side)] * len(inputs[PIXELS[modality]])

    def listen(self, attention: Attention | None) -> AbstractContextManager[list[Tensor]]:
        layers = self.model.model.vision_tower.encoder.layers
        prefix = TOWERS[self.model.config.vision_config.model_type]

        def queries_keys(module: Any, hidden_states: Tensor, **_: Any) -> QueriesKeys:
            heads = (-1, module.num_heads, module.head_dim)
            queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
            lengths = [hidden_states.shape[1]] * hidden_states.shape[0]
            return QueriesKeys(
                queries.reshape(heads), keys.reshape(heads), lengths, module.scale, prefix
            )

        return listen([layer.self_attn for layer in layers], attention, queries_keys)
