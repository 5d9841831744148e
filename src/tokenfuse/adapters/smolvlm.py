"""SmolVLM and Idefics3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys, square_frames
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.tokens import Modality


class SmolVLM(Adapter):
    """SmolVLM and Idefics3: square tiles, each an item, or a frame of a video; 1-D rope.

    Pixel shuffling makes one token of a square of patches. There is no class token. Images of
    zeros, which make all prompts of a batch equally long, are no items.
    """

    name: ClassVar[str] = "smolvlm"
    family: ClassVar[tuple[str, ...]] = ("smolvlm", "idefics3")

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        return [layer.self_attn for layer in self.model.base_model.vision_model.encoder.layers]

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        mask = call.get("attention_mask")
        # It is true for what is seen, or else added to logits.
        if mask is not None and bool((~mask if mask.dtype == torch.bool else mask).any()):
            raise UnsupportedModelError(
                "pixel_attention_mask hides patches of an image, between which attention is not "
                "read; expected ones for every image: let the processor resize images rather than "
                "pad them, or choose a strategy without saliency"
            )
        return square_frames(module, **call, group=self.model.config.scale_factor**2)
