"""InternVL 2.5 and 3, as transformers has them."""

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


class InternVL(Adapter):
    """InternVL: square tiles, each an item, or a frame of a video; 1-D rope.

    Pixel shuffling makes one token of a square of patches. Saliency is what the class token pays,
    which every tile has in the tower and none behind it.
    """

    name: ClassVar[str] = "internvl"
    supplies: ClassVar[frozenset[Need]] = frozenset({"saliency", "text"})
    family: ClassVar[tuple[str, ...]] = ("internvl",)

    @classmethod
    def matches(cls, model: Any) -> bool:
        return super().matches(model) and model.config.vision_config.model_type == "internvl_vision"

    def listen(
        self, attention: Attention | None, inputs: Mapping[str, Any], modality: Modality
    ) -> AbstractContextManager[list[Tensor]]:
        blocks = [layer.attention for layer in self.model.base_model.vision_tower.encoder.layer]
        group = round(1 / self.model.config.downsample_ratio) ** 2
        return listen(blocks, attention, partial(square_frames, prefix=1, group=group))
