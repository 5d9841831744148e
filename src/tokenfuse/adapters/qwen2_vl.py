"""Qwen2-VL."""

from __future__ import annotations

from typing import ClassVar

from tokenfuse.adapters._packed import QwenPacked


class Qwen2VL(QwenPacked):
    """Qwen2-VL: one block of placeholders per video, M-RoPE."""

    name: ClassVar[str] = "qwen2_vl"
    family: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    pixel_scale: ClassVar[tuple[float, float, float]] = (0.26862954, 0.26130258, 0.27577711)
