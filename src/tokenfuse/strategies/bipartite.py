"""Matching of one set of tokens with another, row by row of a batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenfuse.kernels.window import NO_MATCH, STEP, on_host, unit
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies.select import CHUNK, true_indices


def nearest_per_row(
    queries: Float[Tensor, "B n D"], keys: Float[Tensor, "B m D"]
) -> tuple[Float[Tensor, "B n"], Int[Tensor, "B n"]]:
    """The greatest cosine of each query with a key of its row, fp32, and which; lowest on ties.

    A zero vector matches nothing: similarity NO_MATCH and key 0.
    """
    (query, lost), (key, blank) = unit(queries), unit(keys)
    # In units of STEP: rounding makes a tie a tie whatever order the products are summed in.
    query, worst = query / STEP, NO_MATCH / STEP
    bias = torch.where(blank, worst, 0.0)[:, None, :]
    # On a CPU what is compared stays in cache.
    held = CHUNK // 64 if on_host(keys) else CHUNK
    found = []
    for part in query.split(max(1, held // blank.numel()), dim=1):
        # max returns the first of equals.
        found.append(torch.baddbmm(bias, part, key.mT).round_().max(-1))
    best, index = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    best = torch.where(lost, NO_MATCH, best * STEP)
    return best, torch.where(lost, 0, index)


def greatest_per_row(scores: Float[Tensor, "B n"], count: int) -> Int[Tensor, "B k"]:
    """Indices of the ``count`` greatest scores of each row, best first; the lowest on ties."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True)[:, :count]


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
    merged = greatest_per_row(best, r)
    first = torch.arange(batch, device=device)[:, None] * n
    roots = own.scatter(
        0,
        (merged * 2 + even + first).flatten(),
        (match.gather(1, merged) * 2 + odd + first).flatten(),
    )
    return FusionPlan.from_roots(true_indices(roots == own, batch * (n - r)), roots)


def weighted_mean(
    plan: FusionPlan, x: Float[Tensor, "N D"], sizes: Int[Tensor, " N"]
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
