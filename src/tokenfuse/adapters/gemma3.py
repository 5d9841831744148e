"""Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import listen, square_frames
from tokenfuse.strategies._base import Attention, Need
from tokenfuse.tokens import Modality


class Gemma3(Adapter):
    """Gemma 3: square images, whose patches are averaged square by square; 1-D rope.

    Tokens of one image see each other in both directions. Local layers see a window of so many
    tokens, whatever their positions: it counts the tokens that are left, and reaches further back.
    """

    name: ClassVar[str] = "gemma3"
    supplies: ClassVar[frozenset[Need]] = frozenset({"saliency", "text"})
    family: ClassVar[tuple[str, ...]] = ("gemma3",)

    @classmethod
    def matches(cls, model: Any) -> bool:
        vision = getattr(getattr(model, "config", None), "vision_config", None)
        tower = getattr(vision, "model_type", None)
        return super().matches(model) and tower == "siglip_vision_model"

    def listen(
        self, attention: Attention | None, inputs: Mapping[str, Any], modality: Modality
    ) -> AbstractContextManager[list[Tensor]]:
        base = self.model.base_model
        blocks = [layer.self_attn for layer in base.vision_tower.encoder.layers]
        group = base.multi_modal_projector.kernel_size**2
        return listen(blocks, attention, partial(square_frames, group=group))
