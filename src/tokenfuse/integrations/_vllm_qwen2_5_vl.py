"""Qwen2.5-VL of vLLM: the tokens of a video stand in one block, their times in the positions."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenfuse.integrations._vllm_models import Compressing, Laying
from tokenfuse.integrations._vllm_rows import Item, block
from tokenfuse.tokens import Grid


class Processor(Laying, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Lays out one block for a video."""


@MULTIMODAL_REGISTRY.register_processor(
    Processor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen25VL(Compressing, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    times = "second_per_grid_ts"

    def video_item(self, grid: Grid, times: Any) -> Item:
        factor = float(times) * self.config.vision_config.tokens_per_second
        return block(grid, self.config.video_token_id, factor)
