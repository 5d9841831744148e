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

    def spans(
        self, inputs: Mapping[str, Any], modality: Modality, entries: Sequence[Tensor]
    ) -> list[Span]:
        config, option = self.model.config, "vision_feature_select_strategy"
        selected = inputs.get(option) or getattr(config, option, "default")
        if self.prefix and selected == "full":
            # The class token stands before the patches, and is no visual token.
            side = config.vision_config.image_size // config.vision_config.patch_size
            return [Span((1, side, side), head=self.prefix)] * len(entries)
        return super().spans(inputs, modality, entries)
