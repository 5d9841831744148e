"""Gemma 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys, square_frames
from tokenfuse.tokens import Modality


class Gemma3(Adapter):
    """Gemma 3: square images, whose patches are averaged square by square; 1-D rope.

    Tokens of one image see each other in both directions. Local layers see a window of so many
    tokens, whatever their positions: it counts the tokens that are left, and reaches further back.
    """

    name: ClassVar[str] = "gemma3"
    family: ClassVar[tuple[str, ...]] = ("gemma3",)
    towers: ClassVar[tuple[str, ...]] = ("siglip_vision_model",)

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        return [layer.self_attn for layer in self.model.base_model.vision_tower.encoder.layers]

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        side = self.model.base_model.multi_modal_projector.kernel_size
        return square_frames(module, **call, group=side**2)
