"""LLaVA 1.5: one square image per block of placeholders, 1-D rope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import listen, square_frames
from tokenfuse.adapters._spans import Span
from tokenfuse.strategies._base import Attention, Need
from tokenfuse.tokens import Modality

TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision towers, and how many tokens precede their patches."""


class Llava(Adapter):
    """LLaVA 1.5: CLIP or SigLIP, an MLP, and a language model with 1-D rope. Images only.

    Saliency in a CLIP tower is what the class token pays, as FasterVLM and VisionZip read it.
    """

    name: ClassVar[str] = "llava"
    supplies: ClassVar[frozenset[Need]] = frozenset({"saliency", "text"})
    family: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    @classmethod
    def matches(cls, model: Any) -> bool:
        return super().matches(model) and model.config.vision_config.model_type in TOWERS

    def spans(
        self, inputs: Mapping[str, Any], modality: Modality, entries: Sequence[Tensor]
    ) -> list[Span]:
        config, option = self.model.config, "vision_feature_select_strategy"
        selected = inputs.get(option) or getattr(config, option, "default")
        if TOWERS[config.vision_config.model_type] and selected == "full":
            # The class token stands before the patches, and is none.
            side = config.vision_config.image_size // config.vision_config.patch_size
            return [Span((1, side, side), head=1)] * len(entries)
        return super().spans(inputs, modality, entries)

    def listen(
        self, attention: Attention | None, inputs: Mapping[str, Any], modality: Modality
    ) -> AbstractContextManager[list[Tensor]]:
        blocks = [layer.self_attn for layer in self.model.base_model.vision_tower.encoder.layers]
        prefix = TOWERS[self.model.config.vision_config.model_type]
        return listen(blocks, attention, partial(square_frames, prefix=prefix))
