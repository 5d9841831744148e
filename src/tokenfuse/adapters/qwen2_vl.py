"""Qwen2-VL."""

from __future__ import annotations

from typing import ClassVar

from tokenfuse.adapters._packed import Packed


class Qwen2VL(Packed):
    """Qwen2-VL: one block of placeholders per video, M-RoPE."""

    name: ClassVar[str] = "qwen2_vl"
    family: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
