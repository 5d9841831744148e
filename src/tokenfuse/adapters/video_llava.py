"""Video-LLaVA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._spans import Span
from tokenfuse.adapters.llava import Llava
from tokenfuse.errors import PromptError
from tokenfuse.prompt.inputs import PIXELS
from tokenfuse.tokens import Modality

FORMER = "pixel_values_images"
"""What transformers called the pixels of images before 5.21, and by default calls them still."""


class VideoLlava(Llava):
    """Video-LLaVA: a tower for images and one for videos, both CLIP, and 1-D rope.

    The class token of each frame of a video stays before the frame's patches in the prompt; that of
    an image does not. Saliency is what the class token of the image or the frame pays.
    """

    name: ClassVar[str] = "video_llava"
    family: ClassVar[tuple[str, ...]] = ("video_llava",)
    towers: ClassVar[tuple[str, ...]] = ("clip_vision_model",)

    def spans(
        self, inputs: Mapping[str, Any], modality: Modality, entries: Sequence[Tensor]
    ) -> list[Span]:
        if modality == "image":
            return super().spans(inputs, modality, entries)
        videos, frames = inputs[PIXELS[modality]].shape[:2]
        return [Span((frames, self.side, self.side), per_frame=self.prefix)] * videos

    def tower(self, modality: Modality) -> Any:
        return getattr(self.model.base_model, f"{modality}_tower")

    def placeholders(self, inputs: Mapping[str, Any], modality: Modality) -> Tensor:
        if inputs.get(FORMER) is not None:
            raise PromptError(
                f"{FORMER} are given; expected pixel_values, as transformers calls them from 5.21 "
                "on: pass return_legacy_image_output=False to the processor"
            )
        return super().placeholders(inputs, modality)
