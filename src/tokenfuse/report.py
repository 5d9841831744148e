"""What compression did to one prompt, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from tokenfuse.costs import FLOPS_FORMULA, flops, size
from tokenfuse.tokens import Grid, Modality


class ItemReport(BaseModel):
    """One image or video: its grid ``(T, H, W)`` and its tokens, in all and per frame.

    ``tower_tokens``: how many of them each block of the vision tower has read, None where no
    strategy acts there; ``tower_flops_*``: multiply-adds of these blocks, else 0.
    ``matching_flops``: multiply-adds spent on comparing them. ``reason``: why it stays whole, if it
    does. ``hint``: what the strategy says of such a budget, if anything.
    """

    model_config = ConfigDict(frozen=True)

    modality: Modality
    grid: Grid
    tokens_before: int
    tokens_after: int
    frame_tokens_after: list[int]
    tower_tokens: list[int] | None = None
    tower_flops_before: int = 0
    tower_flops_after: int = 0
    matching_flops: int = 0
    reason: str | None = None
    hint: str | None = None

    @property
    def frame_tokens_before(self) -> int:
        """Tokens of each frame before, the same for all."""
        return self.grid[1] * self.grid[2]


class Report(BaseModel):
    """Figures of one compressed prompt. Lengths are tokens, one per row of the batch.

    ``prefill_flops_*`` and ``matching_flops`` are multiply-adds; ``flops_formula`` says how they
    are counted. ``*_ms`` are measured wall-clock milliseconds of this call. ``layer_tokens``: how
    many visual tokens each decoder layer has read, where a strategy acts inside the LLM, layer by
    layer and row by row; the figures after compression count them, and ``score_ms`` is what
    choosing them took. ``tower_flops_*``: those of the vision tower's blocks over all items, where
    a strategy acts before or inside it, else 0; ``tower_ms``: what choosing took there in this
    call. ``encoded_again``: how many images and videos of earlier turns the vision tower had to
    read again, because the inputs do not say which pixels are theirs.
    """

    model_config = ConfigDict(frozen=True)

    strategy: dict[str, Any]
    adapter: str
    items: list[ItemReport]
    reason: str | None = None
    encoded_again: int = 0
    prompt_before: list[int]
    prompt_after: list[int]
    matching_flops: int = 0
    prefill_flops_before: int
    prefill_flops_after: int
    flops_formula: str = FLOPS_FORMULA
    kv_cache_bytes_before: int
    kv_cache_bytes_after: int
    tower_ms: float = 0.0
    encode_ms: float = 0.0
    plan_ms: float = 0.0
    realign_ms: float = 0.0
    layer_tokens: list[list[int]] | None = None
    score_ms: float = 0.0
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

    @property
    def tower_tokens(self) -> list[list[int]] | None:
        """How many visual tokens each vision block has read, block by block and item by item.

        None where no strategy acted there.
        """
        blocks = next((len(x.tower_tokens) for x in self.items if x.tower_tokens is not None), 0)
        read = [x.tower_tokens or [x.tokens_before] * blocks for x in self.items]
        return [list(block) for block in zip(*read, strict=True)] or None

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def layer_average(self) -> float:
        """The share of the source tokens that a decoder layer reads, on average over all layers.

        Where tokens go before the LLM only, the keep ratio.
        """
        if self.layer_tokens is None or not self.tokens_before:
            return self.keep_ratio
        read = sum(map(sum, self.layer_tokens)) / len(self.layer_tokens)
        return read / self.tokens_before

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def tower_flops_before(self) -> int:
        """Multiply-adds of the vision tower's blocks over all items, had nothing gone there."""
        return sum(item.tower_flops_before for item in self.items)

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def tower_flops_after(self) -> int:
        """The same over what they have read."""
        return sum(item.tower_flops_after for item in self.items)

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def reduction(self) -> float:
        """1 - keep ratio."""
        return 1 - self.keep_ratio

    def _repr_html_(self) -> str:
        from tokenfuse.pictures._html import report_html

        return report_html(self)

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
        if self.tower_tokens is not None:
            saved = flops(self.tower_flops_before), flops(self.tower_flops_after)
            lines.insert(
                1,
                f"vision tower  {by_layer(self.tower_tokens, 'block')} tokens, "
                f"{' -> '.join(saved)}, chosen in {self.tower_ms:.1f} ms",
            )
        if self.layer_tokens is not None:
            at = next(i for i, line in enumerate(lines) if line.startswith("prompt"))
            lines.insert(
                at,
                f"in the LLM    {by_layer(self.layer_tokens)}; {self.layer_average:.1%} on "
                f"average over layers, chosen in {self.score_ms:.1f} ms",
            )
        if self.matching_flops > self.prefill_flops_before - self.prefill_flops_after:
            lines.append("slower: matching costs more than the shorter prefill saves")
        if self.encoded_again:
            lines.append(
                f"encoded again: {self.encoded_again} item(s) of earlier turns, since the inputs "
                "do not say which pixels are theirs"
            )
        lines += [f"hint: {hint}" for hint in dict.fromkeys(x.hint for x in self.items if x.hint)]
        if self.reason:
            lines.append(f"not compressed: {self.reason}")
        return "\n".join(lines)


def by_layer(tokens: Sequence[Sequence[int]], noun: str = "layer") -> str:
    """Tokens of each layer for people, ``layers 0-1: 288, 2-31: 144``; all rows together."""
    parts, start = [], 0
    sums = [sum(layer) for layer in tokens]
    for layer in range(1, len(sums) + 1):
        if layer == len(sums) or sums[layer] != sums[start]:
            span = str(start) if layer - 1 == start else f"{start}-{layer - 1}"
            parts.append(f"{span}: {sums[start]}")
            start = layer
    return f"{noun}{'s' if len(sums) > 1 else ''} {', '.join(parts)}"


def _lengths(lengths: Sequence[int]) -> str:
    return " + ".join(map(str, lengths))
