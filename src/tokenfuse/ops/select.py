"""Selections that several strategies share. Pure tensor maths, no host synchronisation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def budget(keep_ratio: float, n: int) -> int:
    """⌈keep_ratio · n⌉ tokens, at least one and at most ``n``."""
    # 0.55 * 100 is 55.000000000000007 in floating point, which must not become 56.
    return max(1, min(n, math.ceil(keep_ratio * n - 1e-9)))


def true_indices(mask: Bool[Tensor, " N"], count: int) -> Int[Tensor, " M"]:
    """The ``count`` positions where ``mask`` is true, ascending; the count is known beforehand."""
    # torch.nonzero_static does the same, but not on every device of the oldest torch supported.
    return torch.argsort(mask.logical_not().to(torch.uint8), stable=True)[:count]


def top(scores: Float[Tensor, " N"], count: int) -> Int[Tensor, " M"]:
    """Indices of the ``count`` greatest scores, ascending; the lowest index on ties."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def top_per_row(scores: Float[Tensor, "R P"], counts: Int[Tensor, " R"]) -> Bool[Tensor, "R P"]:
    """Marks the ``counts[i]`` greatest scores of each row; the lowest index on ties."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    ranks = torch.argsort(order, dim=-1)
    return ranks < counts[:, None]


def spread(count: int, n: int, device: torch.device | None = None) -> Int[Tensor, " M"]:
    """``count`` of ``n`` indices, evenly spaced, ascending: the middles of equal parts."""
    return ((2 * torch.arange(count, device=device) + 1) * n) // (2 * count)
