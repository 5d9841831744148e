"""Which columns of a prompt are left at each decoder layer. Pure tensor functions, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenfuse.tokens import Grid


@dataclass(frozen=True, eq=False)
class Visuals:
    """Where the visual tokens of a prompt ``(B, L)`` stand that a cut inside the LLM may remove.

    ``here (B, L)``: which columns hold one. ``coords (B, L, 3)``: its frame, row and column.
    ``item (B, L)``: the number of its image or video, an index into ``grids``. ``sizes (B, L)``:
    how many tokens it stands for. ``counts``: how many each row has, ``originals``: of how many
    that the vision tower has made. ``lengths``: how many tokens that are no padding each row has.
    Where a cache holds the beginning, all these are of what is new alone; ``earlier``: how many
    visual tokens of each row came before.
    """

    here: Bool[Tensor, "B L"]
    coords: Int[Tensor, "B L 3"]
    item: Int[Tensor, "B L"]
    sizes: Int[Tensor, "B L"]
    grids: tuple[Grid, ...]
    counts: tuple[int, ...]
    originals: tuple[int, ...]
    lengths: tuple[int, ...]
    earlier: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Kept:
    """What the caches of the layers from ``layer`` on hold of the first ``length`` columns.

    ``columns (B, S)``: the column that each entry stands for. ``valid (B, S)``: which entries
    count; the others are padding, so that all rows are equally long. ``whole``: whether all count.
    Entries after these stand for the columns from ``length`` on, one by one.
    """

    layer: int
    columns: Int[Tensor, "B S"]
    valid: Bool[Tensor, "B S"]
    length: int
    whole: bool

    def until(self, width: int) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
        """The columns of all entries until column ``width``, and which of them count."""
        more = torch.arange(self.length, width, device=self.columns.device)
        more = more.expand(len(self.columns), -1)
        return (
            torch.cat([self.columns, more], -1),
            torch.cat([self.valid, torch.ones_like(more, dtype=torch.bool)], -1),
        )


@dataclass(frozen=True, eq=False)
class Layers:
    """What the caches of all layers hold, in ascending order of layers; none before the first.

    ``visual``: for each row the columns of its visual tokens, where pruning while answering asks.
    ``counts``: how many visual tokens each layer holds, layer by layer and row by row.
    """

    kept: tuple[Kept, ...]
    visual: tuple[Int[Tensor, " V"], ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()

    def at(self, layer: int) -> Kept | None:
        """What the cache of one layer holds, None where that is all."""
        return next((kept for kept in reversed(self.kept) if kept.layer <= layer), None)

    def repeat(self, times: int) -> Layers:
        """The same for a batch whose rows are repeated ``times`` times each."""
        return Layers(
            tuple(
                replace(
                    kept,
                    columns=kept.columns.repeat_interleave(times, 0),
                    valid=kept.valid.repeat_interleave(times, 0),
                )
                for kept in self.kept
            ),
            tuple(visual for visual in self.visual for _ in range(times)),
            tuple(tuple(n for n in layer for _ in range(times)) for layer in self.counts),
        )


def pad_left(
    keep: Bool[Tensor, "B L"], counts: Sequence[int]
) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """The columns that ``keep`` marks, in order, behind as many others as make rows equally long.

    ``counts``: how many each row has, known beforehand. The second result tells which are marked.
    No column comes twice in a row.
    """
    most = max(counts)
    order = torch.argsort(keep.to(torch.uint8), dim=-1, stable=True)
    missing = torch.tensor([most - count for count in counts], device=keep.device)
    valid = torch.arange(most, device=keep.device) >= missing[:, None]
    return order[:, keep.shape[1] - most :], valid
