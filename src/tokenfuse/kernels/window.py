"""Best match of every token in a local window of another frame."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_MATCH = -2.0
"""Similarity of a token that matches nothing, below every cosine."""


def window_match(
    queries: Float[Tensor, "F H W D"],
    reference: Float[Tensor, "R H W D"],
    window: int,
) -> tuple[Float[Tensor, "F H W"], Int[Tensor, "F H W"]]:
    """For each query token, the greatest cosine in a ``window × window`` neighbourhood, and where.

    ``reference`` is one frame for all queries (``R = 1``) or one per query frame (``R = F``).
    Returns the similarity, fp32, and the row-major index ``0..H*W-1`` of the match in its reference
    frame. On ties the match with the least ``|di| + |dj|`` wins, then the first in row-major order.
    A zero vector matches nothing: similarity NO_MATCH and its own place.

    Tiles of the grid are compared with their neighbourhood in one product each, so that the
    features are read once and the work grows with the window, not with the grid.
    """
    frames, height, width, _ = queries.shape
    reach = window // 2
    # Few large products suit a GPU; on a CPU a small tile stays in cache and wastes less.
    tile = 4 if queries.device.type == "cpu" else 16
    similarity = queries.new_empty((frames, height, width), dtype=torch.float32)
    index = torch.empty((frames, height, width), dtype=torch.long, device=queries.device)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            rows = slice(top, min(top + tile, height))
            cols = slice(left, min(left + tile, width))
            near_rows = slice(max(0, top - reach), min(height, rows.stop + reach))
            near_cols = slice(max(0, left - reach), min(width, cols.stop + reach))
            cosine = _cosine(queries[:, rows, cols], reference[:, near_rows, near_cols])
            best, place = _best(cosine, rows, cols, near_rows, near_cols, reach, width)
            shape = (frames, rows.stop - rows.start, cols.stop - cols.start)
            similarity[:, rows, cols] = best.view(shape)
            index[:, rows, cols] = place.view(shape)
    return similarity, index


def _cosine(queries: Tensor, near: Tensor) -> Tensor:
    """``(F, n, D)`` against ``(1 or F, m, D)`` tokens: ``(F, n, m)`` fp32, NO_MATCH at zero vectors."""
    frames, width = queries.shape[0], queries.shape[-1]
    q = queries.to(torch.float32).reshape(frames, -1, width)
    r = near.to(torch.float32).reshape(near.shape[0], -1, width)
    q_norm, r_norm = torch.linalg.vector_norm(q, dim=-1), torch.linalg.vector_norm(r, dim=-1)
    if near.shape[0] == 1:
        dots = (q.flatten(0, 1) @ r[0].T).view(frames, -1, r.shape[1])
    else:
        dots = q @ r.mT
    cosine = dots / q_norm[:, :, None] / r_norm[:, None, :]
    exists = (q_norm > 0)[:, :, None] & (r_norm > 0)[:, None, :]
    return torch.where(exists, cosine, NO_MATCH)


def _best(
    cosine: Tensor,
    rows: slice,
    cols: slice,
    near_rows: slice,
    near_cols: slice,
    reach: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The best candidate per query, ties to the nearest, then to the first in row-major order."""
    device = cosine.device
    i, j = _places(rows, cols, device)
    y, x = _places(near_rows, near_cols, device)
    di = (y[None, :] - i[:, None]).abs()
    dj = (x[None, :] - j[:, None]).abs()
    outside = (di > reach) | (dj > reach)
    cosine = cosine.masked_fill(outside, -torch.inf)
    best = cosine.amax(-1)
    candidates = y.shape[0]
    order = (di + dj) * candidates + torch.arange(candidates, device=device)
    tied = cosine == best[..., None]
    order = torch.where(tied, order, torch.iinfo(torch.long).max)
    first = order.argmin(-1)
    place = (y * width + x)[first]
    own = i * width + j
    return best, torch.where(best == NO_MATCH, own, place)


def _places(rows: slice, cols: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    i = torch.arange(rows.start, rows.stop, device=device)
    j = torch.arange(cols.start, cols.stop, device=device)
    grid = torch.meshgrid(i, j, indexing="ij")
    return grid[0].flatten(), grid[1].flatten()
