"""Video Compression Commander."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.select import top_per_row
from tokenfuse.ops.similarity import in_parts
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.tokens import Grid, VisualTokens

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Variances of the Gaussians whose sum says how close a token is to a centre."""
BITS = 17
"""Of a score; fp32 gets some more of them right."""


class VidCom2(Budgeted):
    """Keep the tokens that stand out most, and more of them in frames that stand out.

    Source: VidCom², arXiv 2505.14454, as its code computes it, not the paper's text.

    Tokens are compared in the ``channels`` that vary least over the video. A token is the more
    common the closer it lies to the mean of all tokens and to the mean of its frame. A frame's
    share of the budget grows with how little its tokens resemble the video, through a softmax of
    ``temperature``; it lies between ``keep_ratio`` · (1 − 1/T) and ``keep_ratio`` · (2 − 1/T). Of
    each frame the least common tokens survive.

    The published code rounds every frame's share for itself, so that its total drifts. As in its
    port to vLLM, the commonest survivors of all leave, or the least common others of all return,
    until exactly ⌈keep_ratio · N⌉ are left. Unlike there, no frame loses its last token where the
    budget holds one for each; a smaller budget holds the least common of these.

    The published code scores in the features' dtype, in which bf16 leaves few different values.
    Here scores are fp32, of 17 significant bits, and the lowest index wins on ties. A zero vector
    is compared as it is.

    Never synchronises with the host.
    """

    name: ClassVar[str] = "vidcom2"
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    paper: ClassVar[str] = "arXiv 2505.14454"

    keep_ratio: KeepRatio = 0.25
    channels: float = Field(
        0.5, gt=0, le=1, description="share of the channels to compare, those that vary least"
    )
    temperature: float = Field(
        0.01, gt=0, description="softness of the shares: the higher, the more equal the frames"
    )

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        frames = tokens.frames.flatten(1, 2)
        channels = self._steadiest(frames)

        def parts() -> Iterator[Tensor]:
            for part in in_parts(frames):
                yield torch.nn.functional.normalize(part[..., channels].float(), dim=-1)

        means = [x.mean(1, keepdim=True) for x in parts()]
        centre = torch.cat(means).mean(0, keepdim=True)
        found = []
        for x, mean in zip(parts(), means, strict=True):
            found.append(torch.stack([_strangeness(x, centre), _strangeness(x, mean)]))
        in_video, in_frame = torch.cat(found, 1)
        strange = _in_bits(in_video + in_frame)

        counts = (self._scales(in_video) * frames.shape[1]).round().long().clamp_min(1)
        kept = top_per_row(strange, counts)
        floor = top_per_row(strange, torch.ones_like(counts))
        # Each frame's strangest token first, then what the frames' shares hold, then the rest.
        order = torch.argsort(strange.flatten(), descending=True, stable=True)
        rank = (kept.long() + floor.long()).flatten()[order]
        order = order[torch.argsort(rank, descending=True, stable=True)]
        survivors = order[:count].sort().values
        return FusionPlan.from_survivors(survivors, tokens.num_tokens)

    def matching_flops(self, grid: Grid, width: int) -> int:
        t, h, w = grid
        return 2 * t * h * w * self._compared(width)

    def _compared(self, width: int) -> int:
        return max(1, int(self.channels * width))

    def _steadiest(self, frames: Float[Tensor, "T P D"]) -> Int[Tensor, " C"]:
        """The channels of least variance, the lowest on ties."""
        width, n = frames.shape[-1], frames.shape[0] * frames.shape[1]
        mean = (
            torch.stack([x.sum((0, 1), dtype=torch.float32) for x in in_parts(frames)]).sum(0) / n
        )
        squares = [(x.float() - mean).square_().sum((0, 1)) for x in in_parts(frames)]
        spread = torch.stack(squares).sum(0)
        return torch.argsort(spread, stable=True)[: self._compared(width)].sort().values

    def _scales(self, in_video: Float[Tensor, "T P"]) -> Float[Tensor, " T"]:
        """The share of each frame's tokens that its uniqueness entitles it to."""
        p = torch.softmax(in_video.mean(-1) / self.temperature, dim=0)
        return (self.keep_ratio * (1 + p - p.mean())).clamp_max(1)


def _strangeness(
    x: Float[Tensor, "T P C"], centre: Float[Tensor, "#T 1 C"]
) -> Float[Tensor, "T P"]:
    """What a sum of Gaussians of the distance to ``centre`` lacks to its greatest value.

    Small numbers keep their digits, where a sum near 5 has lost those that tell alike tokens apart.
    """
    distance = (x - centre).square().sum(-1)
    return torch.stack([-torch.expm1(distance / (-2 * width)) for width in WIDTHS]).sum(0)


def _in_bits(x: Float[Tensor, "T P"]) -> Float[Tensor, "T P"]:
    """``x`` rounded to BITS bits of its own, so that a tie is a tie on every device."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**BITS).round(), exponent - BITS)
