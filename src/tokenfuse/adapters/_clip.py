"""Vision towers of LLaVA's kind: CLIP or SigLIP, read block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys, square_frames
from tokenfuse.tokens import Modality

PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision towers, and how many tokens stand before their patches."""


class ClipTower(Adapter):
    """A tower of this kind. Saliency in a CLIP tower is what the class token pays."""

    towers: ClassVar[tuple[str, ...]] = tuple(PREFIX)

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches of a frame in the tower."""
        return PREFIX[self.model.config.vision_config.model_type]

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        return [layer.self_attn for layer in self.model.base_model.vision_tower.encoder.layers]

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        return square_frames(module, **call, prefix=self.prefix)
