"""Whole tokens for frames or segments, in proportion to weights."""

from __future__ import annotations

import torch
from jaxtyping import Int, Num
from torch import Tensor

LEVELS = 2**24
"""Fractions are rounded to this many parts of the greatest, so that quotas are exact fractions."""


def apportion(
    weights: Num[Tensor, " R"],
    total: int,
    most: int | Int[Tensor, " R"],
    least: int = 0,
) -> Int[Tensor, " R"]:
    """``total`` tokens for ``R`` rows in proportion to ``weights``, by the largest remainders.

    Row ``i`` gets ``least`` in any case and its share of what is left, up to ``most`` of them
    (``most[i]``, if it is a tensor); what a full row cannot take goes to the others in the same
    proportion. The lowest index wins on ties. Where ``total`` does not suffice for ``least``, no
    row gets more than that; where it exceeds what the rows can take, all are full.

    Weights are finite and not negative; whole numbers are not rounded. Weights that are all zero
    are all the same; a zero among others gets more than ``least`` when the others are full.

    Never synchronises with the host. Holds (R, R) whole numbers.
    """
    caps = torch.zeros_like(weights, dtype=torch.long) + most
    floors = caps.clamp_max(least)
    enough = floors.sum() <= total
    base = torch.where(enough, floors, 0)
    room = torch.where(enough, caps, floors) - base
    rest = total - base.sum()
    size = _whole(weights)

    # A row is full if at the rate that fills it, room / size, the rows together take no more than
    # there is. Products instead of fractions are exact.
    taken = torch.minimum(room[:, None] * size, room * size[:, None]).sum(-1)
    full = taken <= rest * size
    base = base + torch.where(full, room, 0)

    size = torch.where(full, 0, size)
    quotas = (total - base.sum()) * size
    parts = size.sum().clamp_min(1)
    counts = base + quotas // parts
    order = torch.argsort(quotas % parts, descending=True, stable=True)
    missing = torch.where(full.all(), 0, total - counts.sum())
    return counts + (torch.argsort(order) < missing).long()


def _whole(weights: Tensor) -> Tensor:
    if not weights.is_floating_point():
        # What is next to nothing beside a weight of 1 is what a weight of 0 gets.
        return (torch.where(weights.any(), weights, 1) * LEVELS).clamp_min(1)
    wide = weights.to(torch.float32)
    greatest = wide.amax()
    shares = torch.where(greatest > 0, wide / greatest, 1.0)
    return (shares * LEVELS).round().long().clamp_min(1)
