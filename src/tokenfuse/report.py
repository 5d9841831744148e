"""What compression did to one prompt, and what it cost."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from tokenfuse.tokens import Grid, Modality

FLOPS_FORMULA = (
    "multiply-adds, counted once: layers * (L * (2*h*q + 2*h*kv + 3*h*f) + L^2 * q), "
    "causal; L prompt length, h hidden, q and kv query and key width, "
    "f feed-forward width (active experts)"
)


class ItemReport(BaseModel):
    """One image or video: its grid ``(T, H, W)`` and its tokens, in all and per frame.

    ``reason``: why it stays whole, if it does.
    """

    model_config = ConfigDict(frozen=True)

    modality: Modality
    grid: Grid
    tokens_before: int
    tokens_after: int
    frame_tokens_after: list[int]
    reason: str | None = None

    @property
    def frame_tokens_before(self) -> int:
        """Tokens of each frame before, the same for all."""
        return self.grid[1] * self.grid[2]


class Report(BaseModel):
    """Figures of one compressed prompt. Lengths are tokens, one per row of the batch.

    ``prefill_flops_*`` and ``matching_flops`` are multiply-adds; ``flops_formula`` says how they
    are counted. ``*_ms`` are measured wall-clock milliseconds of this call.
    """

    model_config = ConfigDict(frozen=True)

    strategy: dict[str, Any]
    adapter: str
    items: list[ItemReport]
    reason: str | None = None
    prompt_before: list[int]
    prompt_after: list[int]
    matching_flops: int = 0
    prefill_flops_before: int
    prefill_flops_after: int
    flops_formula: str = FLOPS_FORMULA
    kv_cache_bytes_before: int
    kv_cache_bytes_after: int
    encode_ms: float = 0.0
    plan_ms: float = 0.0
    realign_ms: float = 0.0
    versions: dict[str, str]

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def tokens_before(self) -> int:
        """Visual tokens of all items before."""
        return sum(item.tokens_before for item in self.items)

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def tokens_after(self) -> int:
        """Visual tokens of all items after."""
        return sum(item.tokens_after for item in self.items)

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def keep_ratio(self) -> float:
        """Survivors ÷ source tokens over all items, 1.0 where there is none."""
        return self.tokens_after / self.tokens_before if self.tokens_before else 1.0

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def reduction(self) -> float:
        """1 - keep ratio."""
        return 1 - self.keep_ratio

    @property
    def overhead_ms(self) -> float:
        """tokenfuse's own cost: what an uncompressed run does not spend."""
        return self.plan_ms + self.realign_ms

    def __str__(self) -> str:
        cache = size(self.kv_cache_bytes_before), size(self.kv_cache_bytes_after)
        prefill = flops(self.prefill_flops_before), flops(self.prefill_flops_after)
        lines = [
            f"strategy      {self.strategy['strategy']} on {self.adapter}",
            f"visual tokens {self.tokens_before} -> {self.tokens_after} "
            f"({self.reduction:.1%} removed)",
            f"prompt        {_lengths(self.prompt_before)} -> {_lengths(self.prompt_after)} tokens",
            f"KV cache      {' -> '.join(cache)}",
            f"prefill       {' -> '.join(prefill)}",
            f"matching      {flops(self.matching_flops)} in {self.plan_ms:.1f} ms, "
            f"realignment {self.realign_ms:.1f} ms",
        ]
        for i, item in enumerate(self.items):
            frames = " ".join(map(str, item.frame_tokens_after))
            lines.append(
                f"{item.modality} {i}: {item.tokens_before} -> {item.tokens_after}; of "
                f"{item.frame_tokens_before} per frame: {frames}"
                + (f" ({item.reason})" if item.reason else "")
            )
        if self.matching_flops > self.prefill_flops_before - self.prefill_flops_after:
            lines.append("slower: matching costs more than the shorter prefill saves")
        if self.reason:
            lines.append(f"not compressed: {self.reason}")
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    import tokenfuse

    own = {"tokenfuse": tokenfuse.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in ("torch", "transformers")}


def prefill_flops(config: Any, lengths: Sequence[int]) -> int:
    """Multiply-adds of the decoder over prompts of these lengths, by FLOPS_FORMULA."""
    hidden, head = config.hidden_size, _head_dim(config)
    q: int = config.num_attention_heads * head
    kv = config.num_key_value_heads * head
    experts = getattr(config, "num_experts_per_tok", None)
    wide = config.moe_intermediate_size * experts if experts else config.intermediate_size
    weights: int = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * wide
    layers: int = config.num_hidden_layers
    return layers * sum(n * weights + n * n * q for n in lengths)


def kv_cache_bytes(config: Any, lengths: Sequence[int], element_bytes: int) -> int:
    """Bytes of keys and values that prompts of these lengths leave in the cache.

    Other layers than attention keep a state whose size does not depend on the length.
    """
    per_token: int = 2 * sum(attends(config)) * config.num_key_value_heads * _head_dim(config)
    return per_token * element_bytes * sum(lengths)


def attends(config: Any) -> list[bool]:
    """Which layers of a decoder are attention, not linear attention or a convolution."""
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    return [kind.endswith("attention") and not kind.startswith("linear") for kind in kinds]


def _head_dim(config: Any) -> int:
    head = getattr(config, "head_dim", None)
    return int(head or config.hidden_size // config.num_attention_heads)


def _lengths(lengths: Sequence[int]) -> str:
    return " + ".join(map(str, lengths))


def size(count: float) -> str:
    """Bytes for people: ``1.2 MB``."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def flops(count: float) -> str:
    """FLOPs for people: ``0.16 GFLOPs``."""
    return _scaled(count, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"))


def _scaled(count: float, units: Sequence[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        # From 999.5 on, three digits would read 1e+03.
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {largest}" if abs(count) < 999.5 else f"{count:.0f} {largest}"
