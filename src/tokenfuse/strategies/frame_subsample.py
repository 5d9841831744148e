"""Whole frames at even distances."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokenfuse.ops.select import spread
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.tokens import VisualTokens


class FrameSubsample(Budgeted):
    """Keep whole frames at even distances and drop the others.

    A control: what sampling the video more sparsely would do, with the kept frames' timestamps.
    Where the budget is no whole number of frames, the last of the evenly spaced frames keeps only
    evenly spaced tokens. An item of one frame, such as an image, stays as it is. Never synchronises
    with the host.
    """

    name: ClassVar[str] = "frame_subsample"
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    temporal: ClassVar[bool] = True

    keep_ratio: KeepRatio = 0.5

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        frames, height, width = tokens.grid
        places, device = height * width, tokens.features.device
        whole, rest = divmod(count, places)
        kept = spread(whole + (rest > 0), frames, device) * places
        survivors = kept[:whole, None] + torch.arange(places, device=device)
        parts = [survivors.flatten()]
        if rest:
            parts.append(kept[-1] + spread(rest, places, device))
        return FusionPlan.from_survivors(torch.cat(parts), tokens.num_tokens)
