"""Qwen2.5-VL."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._packed import QwenPacked
from tokenfuse.tokens import Modality


class Qwen25VL(QwenPacked):
    """Qwen2.5-VL: one block of placeholders per video, M-RoPE in seconds, windows in the tower.

    In most vision blocks a patch sees its window alone. Saliency is then the attention in the
    window, times the window's share of the frame, so that it sums to 1 over the frame.
    """

    name: ClassVar[str] = "qwen2_5_vl"
    family: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    pixel_scale: ClassVar[tuple[float, float, float]] = (0.26862954, 0.26130258, 0.27577711)

    def arrange_saliency(
        self, saliency: Tensor, block: int, inputs: Mapping[str, Any], modality: Modality
    ) -> Tensor:
        visual, grids = self.model.base_model.visual, inputs[f"{modality}_grid_thw"]
        # The tower's own order, by the function that it calls.
        index, ends = sys.modules[type(visual).__module__].get_vision_window_index(
            grids, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        if block % len(visual.blocks) not in visual.fullatt_block_indexes:
            window = ends.diff() // visual.spatial_merge_unit
            frame = grids[:, 1:].prod(-1) // visual.spatial_merge_unit
            frame = frame.repeat_interleave(frame * grids[:, 0])
            # A window is within a frame, and an item has the same places in both orders.
            share = window.repeat_interleave(window) / frame
            saliency = saliency * share.to(saliency.device)
        return saliency.new_empty(saliency.shape).index_copy(0, index.to(saliency.device), saliency)
