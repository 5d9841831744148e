"""LLaVA-NeXT and LLaVA-NeXT-Video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenfuse.adapters import _saliency as supply
from tokenfuse.adapters._anyres import AnyRes
from tokenfuse.adapters.llava import TOWERS
from tokenfuse.strategies._base import Attention, Need
from tokenfuse.tokens import Modality


class LlavaNext(AnyRes):
    """LLaVA-NeXT, LLaVA-NeXT-Video: tiles of images, squares of patches of videos, 1-D rope.

    Saliency in a CLIP tower is what the class token of a tile or a frame pays. Of an image's joined
    tiles each counts alike, and what is cut off does not.
    """

    name: ClassVar[str] = "llava_next"
    supplies: ClassVar[frozenset[Need]] = frozenset({"saliency", "text"})
    family: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")

    @classmethod
    def matches(cls, model: Any) -> bool:
        return super().matches(model) and model.config.vision_config.model_type in TOWERS

    @contextmanager
    def listen(
        self, attention: Attention | None, inputs: Mapping[str, Any], modality: Modality
    ) -> Iterator[list[Tensor]]:
        config, video = self.model.config, modality == "video"
        blocks = [layer.self_attn for layer in self.model.base_model.vision_tower.encoder.layers]
        square = partial(
            supply.square_frames,
            prefix=TOWERS[config.vision_config.model_type],
            group=config.spatial_pool_stride**2 if video else 1,
        )
        with supply.listen(blocks, attention, square) as heard:
            yield heard
        if not video:
            heard[:] = [part for found in heard for part in self._joined(inputs, found)]

    def _joined(self, inputs: Mapping[str, Any], found: Tensor) -> list[Tensor]:
        whole = self.side**2
        images = self.pack(inputs, found.view(-1, whole, 1), None)
        parts = [part for image in images for part in image.flatten().tensor_split([whole])]
        return [part / part.sum().clamp_min(torch.finfo(part.dtype).tiny) for part in parts]
