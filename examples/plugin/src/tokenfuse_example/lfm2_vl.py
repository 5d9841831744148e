"""The adapter: images of any shape, whose grids are in an input of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse import Adapter
from tokenfuse.adapters import Span
from tokenfuse.errors import PromptError
from tokenfuse.prompt.inputs import Prompt


class Lfm2VL(Adapter):
    """LFM2-VL: a SigLIP2 tower reads each tile in its own shape. Images only, 1-D rope."""

    name: ClassVar[str] = "lfm2_vl"
    family: ClassVar[tuple[str, ...]] = ("lfm2_vl",)

    def check(self, prompt: Prompt, modality: str) -> None:
        inputs = prompt.inputs
        shapes, mask = inputs.get("spatial_shapes"), inputs.get("pixel_attention_mask")
        if shapes is None or mask is None:
            raise PromptError(
                "spatial_shapes or pixel_attention_mask is missing beside the pixels: pass all "
                "that the processor returns"
            )
        described, given = shapes.prod(-1).tolist(), mask.sum(-1).tolist()
        if described != given:
            raise PromptError(
                f"spatial_shapes describe {described} patches, pixel_attention_mask marks {given}: "
                "pass all that one processor call returns"
            )

    def spans(
        self, inputs: Mapping[str, Any], modality: str, entries: Sequence[Tensor]
    ) -> list[Span]:
        factor = self.model.config.downsample_factor
        return [Span((1, h // factor, w // factor)) for h, w in inputs["spatial_shapes"].tolist()]
