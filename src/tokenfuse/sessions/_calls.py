"""What is left of the prompts while a call of a decoder goes from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenfuse.ops.select import true_indices
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.strategies._layers import LayerCut


@dataclass
class Row:
    """What is left of one prompt. ``columns (n,)``: of the call; ``visual (V,)``: which of them.

    ``fused``: the plans that have fused tokens so far, each with what applies it; ``first``: the
    columns of the visual tokens that the first of them was for.
    """

    columns: Tensor
    visual: Tensor
    coords: Tensor
    item: Tensor
    sizes: Tensor
    original: int
    source: int
    counts: list[int] = field(default_factory=list)
    first: Tensor | None = None
    fused: list[tuple[FusionPlan, Any]] = field(default_factory=list)


class Cut(NamedTuple):
    """What a cut has left of a call; see Call."""

    layer: int
    columns: Tensor
    valid: Tensor
    even: bool


@dataclass
class Call:
    """One call of the decoder. ``past``: columns that its caches stand for. ``cache``: they.

    ``shape``: rows and columns of the call; each prompt has ``times`` rows. ``rows``: the prompts,
    where this call reads them. ``columns (B, S)``: those of the call that are left, ``valid``:
    which of them count, ``even``: whether all do; ``cuts``: the same for each cut so far. ``short
    (B, S, D)``: what the last layer has made of them; ``whole``: the same in its place among all,
    which the model has been given. ``chosen``: the columns whose attention cuts read, ``read``:
    what they have read. ``unread (B, W)``: columns that layers which read the cache in part skip.
    """

    cache: Any
    past: int
    shape: tuple[int, int]
    times: int
    rows: list[Row] | None
    columns: Tensor | None = None
    valid: Tensor | None = None
    even: bool = True
    cuts: list[Cut] = field(default_factory=list)
    short: Tensor | None = None
    whole: Tensor | None = None
    unread: Tensor | None = None
    chosen: dict[int, list[Tensor]] = field(default_factory=dict)
    read: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    # Layers get the same tensors, which are cut once for all of them. While one is held here, its
    # id is nobody else's.
    made: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)


def leave(row: Row, plan: FusionPlan, cut: LayerCut) -> None:
    """Take what a plan removes out of a prompt."""
    if plan.is_identity:
        return
    count = len(row.columns) - plan.num_source + plan.num_kept
    stays = torch.ones_like(row.columns, dtype=torch.bool)
    stays[row.visual] = plan.keep_mask
    visual = torch.zeros_like(stays)
    visual[row.visual] = True
    left = true_indices(stays, count)
    row.columns = row.columns[left]
    row.visual = true_indices(visual[left], plan.num_kept)
    row.coords, row.item = plan.select(row.coords), plan.select(row.item)
    if cut.fuse is None:
        row.sizes = plan.select(row.sizes)
    else:
        slots = torch.where(plan.target == DROPPED, plan.num_kept, plan.target)
        total = row.sizes.new_zeros(plan.num_kept + 1)
        row.sizes = total.index_add(0, slots, row.sizes)[:-1]
