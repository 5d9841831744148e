"""VisionZip."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.select import top, true_indices
from tokenfuse.ops.similarity import nearest
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.strategies._base import Attending, Need
from tokenfuse.strategies._fields import VisionBlock
from tokenfuse.tokens import Grid, VisualTokens


class VisionZip(Attending):
    """Keep each frame's most attended tokens and merge the others into a few of themselves.

    Source: VisionZip, arXiv 2412.04467. Each frame of a video is compressed by itself, as the
    published code does with each image or tile. Its ``dominant`` most salient tokens stay as they
    are. Of the rest, ``contextual`` evenly spaced ones are targets, and every other token goes into
    the target with the greatest cosine (lowest index on ties, and for a zero vector).

    ``merge="paper"``, the published form, adds the mean of what came in to the target, which about
    doubles the length of its feature; ``"mean"`` averages the target with all that came in.

    ``keep_ratio`` gives each frame an equal share of the budget, whole tokens left over going to
    evenly spaced frames. ``contextual_share`` of a frame's tokens, to the nearest whole number, but
    at least one and at most all but one, are contextual. A frame of one token keeps its dominant
    one, a frame of none keeps nothing; what they lose is dropped.

    What differs from the published code: there is no class token to keep among the dominant ones,
    and no fixed grid; a frame with no more tokens than were asked for stays whole instead of
    failing; tokens are compared by the features that the LLM would read, because the keys of the
    vision tower, which the published code compares, belong to patches before their spatial merge;
    contextual tokens keep their places in the sequence instead of following the dominant ones.

    Never synchronises with the host.
    """

    name: ClassVar[str] = "visionzip"
    working_copies: ClassVar[float] = 4.5
    needs: ClassVar[frozenset[Need]] = frozenset({"grid", "saliency"})
    paper: ClassVar[str] = "arXiv 2412.04467"

    dominant: int = Field(54, ge=1, description="most salient tokens that stay, of each frame")
    contextual: int = Field(10, ge=0, description="tokens that absorb the others, of each frame")
    contextual_share: float = Field(
        10 / 64, ge=0, le=1, description="with keep_ratio: share of contextual among kept tokens"
    )
    merge: Literal["paper", "mean"] = Field(
        "paper", description="paper: target plus mean of what it absorbed; mean: mean of all"
    )
    block: VisionBlock = -2

    def num_kept(self, grid: Grid) -> int | None:
        t, h, w = grid
        return super().num_kept(grid) or t * min(h * w, self.dominant + self.contextual)

    def matching_flops(self, grid: Grid, width: int) -> int:
        t, h, w = grid
        count = self.num_kept(grid) or 0
        if count >= t * h * w:
            return 0
        pairs = [(h * w - d, c) for d, c in self._quotas(count, t)]
        return sum(others * targets for others, targets in pairs) * width

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        if self.merge == "mean" or plan.is_identity:
            return plan.fuse(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (plan.select(wide) + plan.absorbed(wide)).to(x.dtype)

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        frames = tokens.frames.flatten(1, 2)
        t, places, _ = frames.shape
        saliency = tokens.needed("saliency").to(torch.float32).view(t, places)
        index = torch.arange(tokens.num_tokens, device=frames.device).view(t, places)
        survivors, roots = [], []
        # How many a frame keeps is known beforehand, so that this loop reads no value.
        for f, (dominant, contextual) in enumerate(self._quotas(count, t)):
            kept, root = _zip(frames[f], saliency[f], dominant, contextual)
            survivors.append(index[f, kept])
            roots.append(torch.where(root == DROPPED, DROPPED, root + f * places))
        return FusionPlan.from_roots(torch.cat(survivors), torch.cat(roots))

    def _quotas(self, count: int, frames: int) -> list[tuple[int, int]]:
        """How many dominant and contextual tokens each frame keeps, ``count`` in all."""
        if self.keep_ratio is None:
            return [(self.dominant, self.contextual)] * frames
        whole, rest = divmod(count, frames)
        # As ops.select.spread has it, in Python's numbers.
        more = {((2 * i + 1) * frames) // (2 * rest) for i in range(rest)}
        return [self._split(whole + (f in more)) for f in range(frames)]

    def _split(self, kept: int) -> tuple[int, int]:
        if kept < 2 or not self.contextual_share:
            return kept, 0
        contextual = min(kept - 1, max(1, round(kept * self.contextual_share)))
        return kept - contextual, contextual


def _zip(frame: Tensor, saliency: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """A frame's survivors, ascending, and the survivor or DROPPED of each of its tokens."""
    places, device = frame.shape[0], frame.device
    kept = top(saliency, dominant)
    index = torch.arange(places, device=device)
    roots = torch.full_like(index, DROPPED).scatter(0, kept, kept)
    if contextual:
        rest = true_indices(roots == DROPPED, places - dominant)
        targets = rest[:: rest.shape[0] // contextual][:contextual]
        _, match = nearest(frame[rest], frame[targets])
        roots = roots.scatter(0, rest, targets[match]).scatter(0, targets, targets)
        kept = torch.cat([kept, targets]).sort().values
    return kept, roots
