"""LLaVA-NeXT and LLaVA-NeXT-Video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenfuse.adapters._anyres import AnyRes
from tokenfuse.adapters._clip import ClipTower
from tokenfuse.adapters._saliency import QueriesKeys, square_frames
from tokenfuse.tokens import Modality


class LlavaNext(ClipTower, AnyRes):
    """LLaVA-NeXT, LLaVA-NeXT-Video: tiles of images, squares of patches of videos, 1-D rope.

    Saliency in a CLIP tower is what the class token of a tile or a frame pays. Of an image's joined
    tiles each counts alike, and what is cut off does not.
    """

    name: ClassVar[str] = "llava_next"
    family: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        side = self.model.config.spatial_pool_stride if modality == "video" else 1
        return square_frames(module, **call, prefix=self.prefix, group=side**2)

    def arrange_saliency(
        self, saliency: Tensor, block: int, inputs: Mapping[str, Any], modality: Modality
    ) -> Tensor:
        if modality == "video":
            return saliency
        whole = self.side**2
        images = self.pack(inputs, saliency.view(-1, whole, 1), None)
        parts = [part for image in images for part in image.flatten().tensor_split([whole])]
        tiny = torch.finfo(saliency.dtype).tiny
        return torch.cat([part / part.sum().clamp_min(tiny) for part in parts])
