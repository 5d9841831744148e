"""Qwen3-VL, Qwen3-VL-MoE, Qwen3.5 and Qwen3.5-MoE of vLLM: text stands before every frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_5, qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenfuse.integrations._vllm_models import Compressing, Laying
from tokenfuse.integrations._vllm_rows import Item, stamped
from tokenfuse.tokens import Grid


def _layout(config: Any, tokenizer: Any, timestamps: Any, per_frame: list[int]) -> Any:
    times = timestamps.tolist() if isinstance(timestamps, Tensor) else timestamps
    return qwen3_vl.Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=per_frame,
        timestamps=[float(x) for x in times],
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
        select_token_id=False,
    )


class Processor(Laying, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Lays out all that is left of a video in its first frame: which frames have it is unknown."""

    def video_layout(self, config: Any, item: Any, grid: Grid, count: int) -> Any:
        left = [count] + [0] * (grid[0] - 1)
        return _layout(config, self.info.get_tokenizer(), item["timestamps"].data, left)


class _Stamped(Compressing):
    times = "timestamps"
    _tokenizer: Any

    def video_item(self, grid: Grid, times: Any) -> Item:
        t, h, w = grid
        ids = torch.tensor(_layout(self.config, self._tokenizer, times, [h * w] * t).full)
        config = self.config
        return stamped(ids, grid, config.video_token_id, config.vision_end_token_id)


def _registered(info: Any) -> Any:
    return MULTIMODAL_REGISTRY.register_processor(
        Processor, info=info, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
    )


@_registered(qwen3_vl.Qwen3VLProcessingInfo)
class Qwen3VL(_Stamped, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""


@_registered(qwen3_vl_moe.Qwen3VLMoeProcessingInfo)
class Qwen3VLMoe(_Stamped, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL-MoE."""


@_registered(qwen3_5.Qwen3_5ProcessingInfo)
class Qwen35(_Stamped, qwen3_5.Qwen3_5ForConditionalGeneration):
    """Qwen3.5."""


@_registered(qwen3_5.Qwen3_5MoeProcessingInfo)
class Qwen35Moe(_Stamped, qwen3_5.Qwen3_5MoeForConditionalGeneration):
    """Qwen3.5-MoE."""
