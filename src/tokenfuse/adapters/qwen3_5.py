"""Qwen3.5."""

from __future__ import annotations

from typing import ClassVar

from tokenfuse.adapters._packed import QwenPacked


class Qwen35(QwenPacked):
    """Qwen3.5, dense and mixture of experts: a timestamp per frame, linear attention, M-RoPE.

    A linear layer reads one token after the other, whatever its position: it sees the prompt that
    is left, as if the removed tokens had never been there.
    """

    name: ClassVar[str] = "qwen3_5"
    family: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_moe")
