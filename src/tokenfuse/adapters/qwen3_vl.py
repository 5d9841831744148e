"""Qwen3-VL, dense and mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters.base import Adapter
from tokenfuse.errors import PromptError
from tokenfuse.tokens import Grid, Modality

FAMILY = ("qwen3_vl", "qwen3_vl_moe")


class Qwen3VL(Adapter):
    """Qwen3-VL: a timestamp before every frame, DeepStack features, M-RoPE of four rows."""

    name: ClassVar[str] = "qwen3_vl"

    @classmethod
    def matches(cls, model: Any) -> bool:
        return getattr(getattr(model, "config", None), "model_type", None) in FAMILY

    def grids(self, inputs: Mapping[str, Any], modality: Modality) -> list[Grid]:
        patches = inputs.get(f"{modality}_grid_thw")
        if patches is None:
            raise PromptError(
                f"{modality}_grid_thw is missing beside the pixels; expected (items, 3): pass all "
                "that the processor returns"
            )
        merge = self.model.config.vision_config.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in patches.tolist()]

    def position_delta(self) -> Tensor | None:
        delta: Tensor | None = self.model.model.rope_deltas
        return delta

    def set_position_delta(self, delta: Tensor | None) -> None:
        self.model.model.rope_deltas = delta
