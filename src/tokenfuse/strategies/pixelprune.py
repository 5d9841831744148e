"""PixelPrune."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tokenfuse.ops.pixels import Metric, unpredicted
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._early import TowerStrategy
from tokenfuse.strategies._tower import PixelTokens


class PixelPrune(TowerStrategy):
    """Keep patches that their neighbours do not predict out of the vision tower.

    Source: PixelPrune, arXiv 2604.00886. The patches of a visual token are predicted by those at
    the left, or by those above where what lies between is like the left and unlike what is above.
    What differs from its prediction by ``theta`` or less never enters the tower, by the greatest
    difference of a pixel (``max``, between 0 and 1), their mean (``mae``) or root mean square
    (``rmse``). At 0 only what is exactly equal goes; below 0 nothing. Survivors keep their places
    in the tower and in the prompt.

    With ``over_time``, which is ours, a patch also goes where the same place one frame earlier
    predicts it: a still video costs one frame. With ``anchored`` neighbours are compared as they
    are rebuilt from survivors, so that errors never add up to more than ``theta``.

    Lossless in pixels at 0, not in features: what is left attends to fewer keys. Of a still patch
    of another colour than its neighbours something always stays; resizing and compression leave few
    exact copies in photographs, many in drawings, pages and screens.

    Synchronises with the host once for each item, as does what holds its plan against what a plan
    has to be. Loops over diagonals where ``theta`` is above 0.
    """

    name: ClassVar[str] = "pixelprune"
    paper: ClassVar[str] = "arXiv 2604.00886"

    theta: float = Field(0.0, le=1, description="difference of a patch that its neighbours excuse")
    metric: Metric = Field("max", description="how the difference of two patches is measured")
    anchored: bool = Field(True, description="compare with what neighbours are rebuilt from")
    over_time: bool = Field(True, description="predict from the frame before, too")

    @torch.no_grad()
    def tower_plan(self, pixels: PixelTokens) -> FusionPlan:
        n, grid = pixels.num_tokens, pixels.grid
        kept = unpredicted(
            pixels.pixels.view(*grid, *pixels.pixels.shape[1:]),
            pixels.scale,
            self.theta,
            self.metric,
            anchored=self.anchored,
            over_time=self.over_time,
        )
        return FusionPlan.from_survivors(kept.flatten().nonzero().flatten(), n)
