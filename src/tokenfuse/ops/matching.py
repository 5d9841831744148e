"""Matching of one set of tokens with another, row by row of a batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Num
from torch import Tensor

from tokenfuse.ops.select import true_indices
from tokenfuse.ops.similarity import nearest_per_row
from tokenfuse.plan import FusionPlan


def most_pairs(n: int, protected: int = 0) -> int:
    """How many of ``n`` tokens one round of bipartite soft matching can merge away."""
    return max(0, (n - protected) // 2)


@torch.no_grad()
def bipartite_soft_matching(
    metric: Float[Tensor, "... N C"], r: int, protected: int = 0
) -> FusionPlan:
    """Merge ``r`` tokens at even places into the most similar ones at odd places.

    ``metric``: ``(N, C)``, or ``(B, N, C)``, whose plan is for the ``B * N`` rows one after the
    other. The even tokens with the greatest cosine merge, the lowest index on ties; several may
    merge into one. The first ``protected`` tokens, such as a class token and registers, neither
    merge nor absorb. No more than half of the others, rounded down, can merge. A zero vector
    matches nothing and merges last.
    """
    n = metric.shape[-2]
    rows = metric.reshape(-1, n, metric.shape[-1])
    batch, device = rows.shape[0], rows.device
    own = torch.arange(batch * n, device=device)
    r = min(r, most_pairs(n, protected))
    if r <= 0:
        return FusionPlan(own, own)
    even = protected + protected % 2
    odd = protected + 1 - protected % 2
    best, match = nearest_per_row(rows[:, even::2], rows[:, odd::2])
    merged = torch.argsort(best, dim=-1, descending=True, stable=True)[:, :r]
    first = torch.arange(batch, device=device)[:, None] * n
    roots = own.scatter(
        0,
        (merged * 2 + even + first).flatten(),
        (match.gather(1, merged) * 2 + odd + first).flatten(),
    )
    return FusionPlan.from_roots(true_indices(roots == own, batch * (n - r)), roots)


def weighted_mean(
    plan: FusionPlan, x: Float[Tensor, "N D"], sizes: Num[Tensor, " N"]
) -> Float[Tensor, "M D"]:
    """One row per survivor: the mean of all that belong to it, weighted by ``sizes``.

    For a plan that drops nothing. A row that nothing merged into comes back bit by bit.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = sizes.to(wide)
    total = weights.new_zeros(plan.num_kept).index_add_(0, plan.target, weights)
    shares = weights / total[plan.target]
    mean = x.new_zeros((plan.num_kept, x.shape[-1]), dtype=wide)
    return mean.index_add(0, plan.target, x.to(wide) * shares[:, None]).to(x.dtype)
