"""InternVL 2.5 and 3, as transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys, square_frames
from tokenfuse.tokens import Modality


class InternVL(Adapter):
    """InternVL: square tiles, each an item, or a frame of a video; 1-D rope.

    Pixel shuffling makes one token of a square of patches. Saliency is what the class token pays,
    which every tile has in the tower and none behind it.
    """

    name: ClassVar[str] = "internvl"
    family: ClassVar[tuple[str, ...]] = ("internvl",)
    towers: ClassVar[tuple[str, ...]] = ("internvl_vision",)

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        return [layer.attention for layer in self.model.base_model.vision_tower.encoder.layer]

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        side = round(1 / self.model.config.downsample_ratio)
        return square_frames(module, **call, prefix=1, group=side**2)
