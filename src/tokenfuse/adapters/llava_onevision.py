"""LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tokenfuse.adapters._anyres import AnyRes
from tokenfuse.adapters._clip import FrameTower
from tokenfuse.errors import PromptError


class LlavaOnevision(FrameTower, AnyRes):
    """LLaVA-OneVision: tiles of one image, several images as they are; 1-D rope.

    Frames of a video, and tiles joined to many tokens, are interpolated, so that a token is no
    square of patches: there is no saliency.
    """

    name: ClassVar[str] = "llava_onevision"
    family: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        found, images = super().tiles(inputs), inputs.get("batch_num_images")
        if images is None:
            return found
        if len(found) != int(sum(images)):
            raise PromptError(
                f"image_sizes describe {len(found)} images, batch_num_images {int(sum(images))}: "
                "pass all that one processor call returns"
            )
        # Of several images in a prompt none is cut.
        alone = [int(n) == 1 for n in images for _ in range(int(n))]
        return [n if cut else 1 for n, cut in zip(found, alone, strict=True)]

    def packing(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ratio = inputs.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        return {"vision_aspect_ratio": ratio}
