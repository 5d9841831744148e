"""Vision towers of LLaVA's kind: CLIP or SigLIP, read block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys, square_frames
from tokenfuse.adapters._tower_frames import FrameStage
from tokenfuse.prompt.inputs import PIXELS
from tokenfuse.strategies._base import Strategy
from tokenfuse.tokens import Modality

PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision towers, and how many tokens stand before their patches."""


class FrameTower(Adapter):
    """A tower that reads images and frames of one size, each by itself: whole frames can go."""

    @property
    def cuts_tower(self) -> Literal["frames"] | None:
        known = self.model.config.vision_config.model_type in PREFIX
        # An image is one frame.
        return "frames" if known and hasattr(self.model.base_model, "get_video_features") else None

    def tower(self, modality: Modality) -> Any:
        """The tower that reads a modality."""
        return self.model.base_model.vision_tower

    @property
    def tower_blocks(self) -> Sequence[nn.Module]:
        return list(self.tower("video").encoder.layers)

    def tower_stage(
        self, inputs: Mapping[str, Any], modality: Modality, strategy: Strategy
    ) -> FrameStage:
        videos, frames = inputs[PIXELS[modality]].shape[:2]
        device = inputs[PIXELS[modality]].device
        tower = self.tower(modality)
        return FrameStage(tower, self.tower_blocks, [frames] * videos, strategy, device)


class ClipTower(FrameTower):
    """A tower of this kind. Saliency in a CLIP tower is what the class token pays."""

    towers: ClassVar[tuple[str, ...]] = tuple(PREFIX)

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches of a frame in the tower."""
        return PREFIX[self.model.config.vision_config.model_type]

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        return [layer.self_attn for layer in self.tower(modality).encoder.layers]

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        return square_frames(module, **call, prefix=self.prefix)
