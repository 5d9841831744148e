"""Qwen2.5-VL."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._packed import Packed
from tokenfuse.adapters._saliency import calls
from tokenfuse.strategies._base import Attention
from tokenfuse.tokens import Modality


class Qwen25VL(Packed):
    """Qwen2.5-VL: one block of placeholders per video, M-RoPE in seconds, windows in the tower.

    In most vision blocks a patch sees its window alone. Saliency is then the attention in the
    window, times the window's share of the frame, so that it sums to 1 over the frame.
    """

    name: ClassVar[str] = "qwen2_5_vl"
    family: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    @contextmanager
    def listen(
        self, attention: Attention | None, inputs: Mapping[str, Any], modality: Modality
    ) -> Iterator[list[Tensor]]:
        with (
            calls(self.model.base_model.visual) as towers,
            super().listen(attention, inputs, modality) as heard,
        ):
            yield heard
        if attention is not None:
            for i, (call, found) in enumerate(zip(towers, heard, strict=True)):
                heard[i] = self._raster(found, call["grid_thw"], attention.block)

    def _raster(self, found: Tensor, grids: Tensor, block: int) -> Tensor:
        """The saliency ``(N,)`` of tokens in window order, in the order of the grids."""
        visual = self.model.base_model.visual
        # The tower's own order, by the function that it calls.
        index, ends = sys.modules[type(visual).__module__].get_vision_window_index(
            grids, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        if block % len(visual.blocks) not in visual.fullatt_block_indexes:
            window = ends.diff() // visual.spatial_merge_unit
            frame = grids[:, 1:].prod(-1) // visual.spatial_merge_unit
            frame = frame.repeat_interleave(frame * grids[:, 0])
            # A window is within a frame, and an item has the same places in both orders.
            found = found * (window.repeat_interleave(window) / frame).to(found.device)
        return found.new_empty(found.shape).index_copy(0, index.to(found.device), found)
