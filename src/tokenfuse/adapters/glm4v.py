"""GLM-4.1V, GLM-4.5V and GLM-4.6V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._packed import Packed
from tokenfuse.errors import PromptError
from tokenfuse.prompt.inputs import shown
from tokenfuse.tokens import Modality

TYPES: dict[Modality, int] = {"image": 1, "video": 2}
"""Values of mm_token_type_ids."""


class GLM4V(Packed):
    """GLM-4V: the frames of a video are written as images, each after its timestamp.

    One placeholder stands for both, and ``mm_token_type_ids`` tells them apart. The model itself
    takes images or videos in one call, not both.
    """

    name: ClassVar[str] = "glm4v"
    family: ClassVar[tuple[str, ...]] = ("glm4v", "glm4v_moe", "glm46v")

    def placeholder_id(self, modality: Modality) -> int | None:
        return super().placeholder_id("image")

    def frame_bounds(self, ids: Sequence[int], frames: Sequence[tuple[int, int]]) -> list[int]:
        # The timestamp stands after each frame, up to the next frame's marker or the video's end.
        begins, ends = self.model.config.image_start_token_id, self.model.config.video_end_token_id
        starts = [start - (start > 0 and ids[start - 1] == begins) for start, _ in frames]
        last = frames[-1][1]
        rest = ids[last:]
        if ends not in rest:
            raise PromptError(
                f"no token {ends} ends the video, so that it cannot be told which timestamp is the "
                "last frame's; expected the processor's own text around it, or frames in the order "
                "of time (order: time)"
            )
        return [*starts, last + rest.index(ends)]

    def placeholders(self, inputs: Mapping[str, Any], modality: Modality) -> Tensor:
        here, types = super().placeholders(inputs, modality), inputs.get("mm_token_type_ids")
        if types is None:
            if shown(inputs):
                raise PromptError(
                    "mm_token_type_ids is missing, which tells a video's placeholders from an "
                    "image's; expected (B, L): pass all that the processor returns"
                )
            return here
        of_kind: Tensor = types == TYPES[modality]
        return here & of_kind
