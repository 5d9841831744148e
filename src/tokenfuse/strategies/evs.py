"""Efficient Video Sampling."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tokenfuse.ops.similarity import rowwise
from tokenfuse.strategies._base import Need, Scored
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.tokens import Grid, VisualTokens


class EVS(Scored):
    """Keep the first frame and the tokens that changed most since the frame before.

    Source: Efficient Video Sampling, arXiv 2510.14624, in the form that serving engines run, on
    features. (The paper compares pixels.)

    A token's change is 1 − cosine with the same place one frame earlier, whether or not that token
    is kept. The first frame counts as changed above all. The tokens that changed most survive, the
    lowest index on ties, so that a still video keeps its first frame and then its lowest indices. A
    zero vector is at right angles to everything.

    ``keep_ratio`` is one minus the published pruning rate. The published code keeps at least one
    whole frame, and the whole part of its budget; here exactly ⌈keep_ratio · N⌉ tokens stay. A
    budget below one frame therefore keeps the first tokens of the first frame, and no other: give
    short videos a ratio above 1 / T. An item of one frame, such as an image, stays as it is.

    Never synchronises with the host.
    """

    name: ClassVar[str] = "evs"
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    temporal: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2510.14624"

    keep_ratio: KeepRatio = 0.25

    def score(self, tokens: VisualTokens) -> Float[Tensor, " N"]:
        frames = tokens.frames
        now, before = frames[1:].flatten(0, 2), frames[:-1].flatten(0, 2)
        change = 1 - rowwise(now, before, blank=0.0)
        first = change.new_full((tokens.num_tokens - change.shape[0],), math.inf)
        return torch.cat([first, change])

    def matching_flops(self, grid: Grid, width: int) -> int:
        t, h, w = grid
        return (t - 1) * h * w * width
