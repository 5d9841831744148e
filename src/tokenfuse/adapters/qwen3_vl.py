"""Qwen3-VL."""

from __future__ import annotations

from typing import ClassVar

from tokenfuse.adapters._packed import QwenPacked


class Qwen3VL(QwenPacked):
    """Qwen3-VL, dense and mixture of experts: a timestamp per frame, DeepStack, M-RoPE."""

    name: ClassVar[str] = "qwen3_vl"
    family: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_moe")
