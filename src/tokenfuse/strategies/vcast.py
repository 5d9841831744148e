"""V-CAST: curvature-aware spatio-temporal pruning."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.apportion import apportion
from tokenfuse.ops.select import top_per_row, true_indices
from tokenfuse.ops.similarity import STEP, frame_means, in_parts, rowwise, to_steps
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.tokens import Grid, VisualTokens

STILL = 1e-6
"""Steps between frames' directions that are shorter are rounding, and point nowhere."""


class VCast(Budgeted):
    """Keep the tokens least like their frame's mean, and more of them where the video turns.

    Source: V-CAST, arXiv 2603.27650.

    The frames' mean vectors, normalised, are a path. Its curvature at a frame is 1 − the cosine of
    the step to the frame and the step from it: 0 straight on, 2 on the way back. It is 1 at both
    ends, and where either step is none. Every frame keeps one token, and the rest of the budget is
    shared by the softmax of curvature / ``temperature``, by the largest remainders. Where the
    budget does not hold one token per frame, the frames of greatest curvature keep one (the
    earliest on ties).

    Of each frame those tokens survive whose 1 − cosine with the frame's mean, plus length, is
    greatest (lowest index on ties). Lengths are rescaled to 0..1 within the frame; where they are
    the same, they do not count. A zero vector is at right angles to everything.

    The published code gives one frame, the one with the greatest remainder, all that rounding
    leaves, and all that full frames cannot take; here the greatest remainders get one each, and the
    rest is shared out again in proportion. It raises a budget below one token per
    frame and passes images through, and its ratio is fixed; here exactly ⌈keep_ratio · N⌉ tokens
    stay, of images too. Curvature and scores are fp32 for every dtype.

    Never synchronises with the host.
    """

    name: ClassVar[str] = "vcast"
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    paper: ClassVar[str] = "arXiv 2603.27650"

    keep_ratio: KeepRatio = 0.25
    temperature: float = Field(
        0.7, gt=0, description="softness of the shares: the higher, the more equal the frames"
    )

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        frames = tokens.frames.flatten(1, 2)
        means = frame_means(frames)
        weights = torch.softmax(_curvature(means) / self.temperature, dim=0)
        counts = apportion(weights, count, frames.shape[1], least=1)

        unlike = 1 - rowwise(frames, means[:, None].expand(frames.shape), blank=0.0)
        kept = top_per_row(unlike + _relative_length(frames), counts)
        return FusionPlan.from_survivors(true_indices(kept.flatten(), count), tokens.num_tokens)

    def matching_flops(self, grid: Grid, width: int) -> int:
        t, h, w = grid
        return (t * h * w + max(0, t - 2)) * width


def _curvature(means: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
    steps = torch.nn.functional.normalize(means, dim=-1).diff(dim=0)
    moved = torch.linalg.vector_norm(steps, dim=-1, keepdim=True) > STILL
    steps = torch.where(moved, steps, 0)
    ends = means.new_ones(1)
    bends = 1 - rowwise(steps[:-1], steps[1:], blank=0.0)
    return torch.cat([ends, bends, ends])[: means.shape[0]]


def _relative_length(frames: Float[Tensor, "T P D"]) -> Float[Tensor, "T P"]:
    """Lengths between the least and the greatest of the frame, 0..1, in multiples of STEP."""
    parts = in_parts(frames)
    length = torch.cat([torch.linalg.vector_norm(x.to(torch.float32), dim=-1) for x in parts])
    least, greatest = length.aminmax(dim=-1, keepdim=True)
    differs = greatest - least > STEP * greatest
    share = (length - least) / torch.where(differs, greatest - least, 1)
    return to_steps(torch.where(differs, share, 0))
