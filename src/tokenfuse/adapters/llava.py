"""LLaVA 1.5: one square image per block of placeholders, 1-D rope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._clip import ClipTower
from tokenfuse.adapters._spans import Span
from tokenfuse.tokens import Modality


class Llava(ClipTower):
    """LLaVA 1.5: CLIP or SigLIP, an MLP, and a language model with 1-D rope. Images only.

    Saliency in a CLIP tower is what the class token pays, as FasterVLM and VisionZip read it.
    """

    name: ClassVar[str] = "llava"
    family: ClassVar[tuple[str, ...]] = ("llava", "vipllava")

    @property
    def side(self) -> int:
        """Patches in each row and column of an image."""
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def spans(
        self, inputs: Mapping[str, Any], modality: Modality, entries: Sequence[Tensor]
    ) -> list[Span]:
        option = "vision_feature_select_strategy"
        selected = inputs.get(option) or getattr(self.model.config, option, "default")
        if self.prefix and selected == "full":
            # The class token stands before the patches, and is no visual token.
            return [Span((1, self.side, self.side), head=self.prefix)] * len(entries)
        return super().spans(inputs, modality, entries)
