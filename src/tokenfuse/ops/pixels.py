"""Which patches of a picture or a video say something that their neighbours do not."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Metric = Literal["max", "mae", "rmse"]


def unpredicted(
    pixels: Float[Tensor, "T H W C K"],
    scale: Float[Tensor, " C"],
    theta: float,
    metric: Metric = "max",
    *,
    anchored: bool = True,
    over_time: bool = True,
) -> Bool[Tensor, "T H W"]:
    """Marks the patches that no neighbour predicts within ``theta``.

    A patch is predicted by the one at its left, or by the one above where that at its left is like
    the one between them and the other is not; the first of a row from above, the first of all by
    nothing. With ``over_time`` also by the same place one frame earlier. Two are alike where the
    ``metric`` of their difference, each channel times its ``scale``, is ``theta`` or less: its
    greatest absolute value, their mean, or their root mean square. ``anchored`` compares with what
    neighbours are rebuilt from, so that errors do not add up; it loops over diagonals. At 0 both
    are the same.

    Source: PixelPrune, arXiv 2604.00886; prediction over time is ours.
    """
    t, h, w = pixels.shape[:3]
    rebuilt, kept = pixels, torch.ones(t, h, w, dtype=torch.bool, device=pixels.device)
    if theta < 0:
        return kept
    frame, row, column = (
        x.flatten()
        for x in torch.meshgrid(
            *(torch.arange(n, device=pixels.device) for n in (t, h, w)), indexing="ij"
        )
    )
    if not anchored or theta == 0:
        return _marks(rebuilt, frame, row, column, scale, theta, metric, over_time)[0].view(t, h, w)
    rebuilt = pixels.clone()
    # All that a patch depends on lies on an earlier diagonal through space and time.
    diagonal, lengths = frame + row + column, _diagonals(t, h, w)
    for here in diagonal.argsort(stable=True).split(lengths):
        at = (frame[here], row[here], column[here])
        new, predicted = _marks(rebuilt, *at, scale, theta, metric, over_time)
        kept[at] = new
        rebuilt[at] = torch.where(new[:, None, None], rebuilt[at], predicted)
    return kept


def _diagonals(t: int, h: int, w: int) -> list[int]:
    """How many patches have each sum of frame, row and column."""
    counts = [0] * (t + h + w - 2)
    for frame in range(t):
        for row in range(h):
            # One patch in each of the next columns.
            counts[frame + row] += 1
            if frame + row + w < len(counts):
                counts[frame + row + w] -= 1
    return list(accumulate(counts))


def _marks(
    x: Tensor,
    frame: Tensor,
    row: Tensor,
    column: Tensor,
    scale: Tensor,
    theta: float,
    metric: Metric,
    over_time: bool,
) -> tuple[Tensor, Tensor]:
    """Which of some patches are not predicted, and what predicts the others."""

    def like(a: Tensor, b: Tensor) -> Tensor:
        if theta == 0:
            # Without arithmetic, which could make unlike values equal.
            return (a == b).flatten(1).all(-1)
        apart = ((a.float() - b.float()) * scale[:, None]).abs().flatten(1)
        if metric == "max":
            return apart.amax(-1) <= theta
        return (apart.mean(-1) if metric == "mae" else apart.square().mean(-1).sqrt()) <= theta

    own = x[frame, row, column]
    up, back = (row - 1).clamp_min(0), (column - 1).clamp_min(0)
    left, above, between = x[frame, row, back], x[frame, up, column], x[frame, up, back]
    upward = (like(between, left) & ~like(between, above)) | (column == 0)
    upward = upward & (row > 0)
    predicted = torch.where(upward[:, None, None], above, left)
    old = like(own, predicted) & ((row > 0) | (column > 0))
    if over_time:
        earlier = x[(frame - 1).clamp_min(0), row, column]
        still = like(own, earlier) & (frame > 0)
        predicted = torch.where(still[:, None, None], earlier, predicted)
        old = old | still
    return ~old, predicted
