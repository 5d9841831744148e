"""Selections that several strategies share. Pure tensor maths, no host synchronisation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def budget(keep_ratio: float, n: int) -> int:
    """⌈keep_ratio · n⌉ tokens, at least one; a ratio that means a whole number gives just that."""
    # 0.55 * 100 is 55.000000000000007 in floating point: not a reason to keep 56.
    return max(1, min(n, math.ceil(keep_ratio * n - 1e-9)))


def first_argmax(x: Tensor) -> Int[Tensor, "..."]:
    """Index of the greatest entry of the last axis, the lowest on ties."""
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), index, x.shape[-1] - 1).amin(-1)


def true_indices(mask: Bool[Tensor, " N"], count: int) -> Int[Tensor, " M"]:
    """The ``count`` positions where ``mask`` is true, ascending; the count is known beforehand."""
    return torch.argsort(mask.logical_not().to(torch.uint8), stable=True)[:count]
