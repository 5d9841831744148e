"""Attended tokens and density-peak anchors of the last frames of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.cluster import density_peaks
from tokenfuse.ops.select import top_per_row, true_indices
from tokenfuse.ops.similarity import frame_means, nearest, turned
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.strategies._base import Attending, Need, Query
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.strategies._windows import runs, share_out
from tokenfuse.tokens import VisualTokens

NEIGHBOURS = 4
"""Nearest neighbours that tell how dense a token's surroundings are."""


class FastVID(Attending):
    """Keep attended tokens and density-peak anchors of few frames; fuse the rest into anchors.

    Source: FastVID, arXiv 2503.11187, in its form for Qwen2.5-VL, with that form's defaults.

    The video is cut into segments at the ``segments`` - 1 least similar pairs of consecutive frames
    (mean vectors, cosine) and wherever the similarity is below ``threshold``. A segment's budget is
    its share of the frames. A segment is cut into runs where the similarity is below ``alike``, and
    only the last frame of a run carries budget. Of the budget the share ``context`` (one token at
    least) is for anchors, in every ``anchor_every``-th run from the segment's end, at most half of
    a frame, the odd ones in the latest; the rest is for the tokens that the frame's mean query
    attends to most, evenly over the runs. Anchors are density peaks among the others of their
    frame. Each further token of the segment joins the most similar anchor. An anchor becomes w ·
    itself + (1 - w) · the mean of what joined it, w = max(1 / (1 + how many joined), ``beta``);
    attended tokens stay as they are.

    What differs from the published code: the budget is exact, where it truncates per frame and
    loses what exceeds a frame. Segments get whole tokens by the largest remainders, the earliest on
    ties; what the carrying frames of one segment cannot take goes to the others in proportion, and
    when all are full to the attended tokens of the other frames, evenly. A token joins one anchor
    of its segment, where it would count once for every frame of anchors, and anchors do not join
    each other, so that each token is in one survivor. A segment without anchors drops what it does
    not keep. Videos of fewer frames than ``segments`` work; clustering is deterministic.

    A zero vector joins the first anchor of its segment, and a frame whose mean is zero is unlike
    its neighbours. Cuts are made by the length of the difference of the means' directions, which
    tells frames apart that cosines no longer do.

    Synchronises with the host once, to cut the video and share the budget out there. Loops over
    segments.
    """

    name: ClassVar[str] = "fastvid"
    working_copies: ClassVar[float] = 6
    needs: ClassVar[frozenset[Need]] = frozenset({"grid", "saliency"})
    query: ClassVar[Query] = "mean"
    paper: ClassVar[str] = "arXiv 2503.11187"

    keep_ratio: KeepRatio = 0.27
    segments: int = Field(8, ge=1, description="segments of the video, at least")
    threshold: float = Field(
        0.84, ge=-1, description="similarity of consecutive frames below which a segment ends"
    )
    alike: float = Field(
        0.95, ge=-1, description="similarity below which a run ends inside a segment"
    )
    context: float = Field(0.4, ge=0, le=1, description="share of the budget that anchors get")
    anchor_every: int = Field(4, ge=1, description="runs per frame of anchors")
    beta: float = Field(0.6, ge=0, le=1, description="least weight of an anchor in its own value")

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own, others = plan.select(wide), plan.absorbed(wide)
        weight = (1 / plan.sizes.to(wide.dtype)).clamp_min(self.beta)[:, None]
        # A weight of 1 leaves every bit as it is.
        return torch.where(weight == 1, own, weight * own + (1 - weight) * others).to(x.dtype)

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        frames = tokens.frames.flatten(1, 2)
        t, places = frames.shape[:2]
        means = frame_means(frames)
        # The one host synchronisation.
        similar = [1 - step**2 / 2 for step in turned(means[:-1], means[1:]).tolist()]
        share = self._share(similar, count, places)

        saliency = tokens.needed("saliency").to(torch.float32).view(t, places)
        kept = top_per_row(saliency, torch.tensor(share.salient, device=frames.device))
        index = torch.arange(t * places, device=frames.device)
        root = torch.where(kept.flatten(), index, DROPPED)
        with_anchors = [i for i, number in enumerate(share.anchors) if number]
        if with_anchors:
            some = torch.tensor(with_anchors, device=frames.device)
            numbers = [share.anchors[i] for i in with_anchors]
            scores = density_peaks(frames[some], ~kept[some], NEIGHBOURS)
            anchors = top_per_row(scores, torch.tensor(numbers, device=frames.device))
            is_anchor = torch.zeros_like(kept).index_copy(0, some, anchors)
            kept = kept | is_anchor
            for span in share.segments:
                root = self._join(span, share, frames, is_anchor, root)
            root = torch.where(kept.flatten(), index, root)
        return FusionPlan.from_roots(true_indices(kept.flatten(), count), root)

    def _join(
        self, span: range, share: _Share, frames: Tensor, is_anchor: Tensor, root: Tensor
    ) -> Tensor:
        """``root`` with the most similar anchor of the segment for each of its tokens."""
        number = sum(share.anchors[span.start : span.stop])
        if not number:
            return root
        first, inside = span.start * frames.shape[1], slice(span.start, span.stop)
        x = frames[inside].flatten(0, 1)
        anchors = true_indices(is_anchor[inside].flatten(), number)
        _, best = nearest(x, x[anchors])
        places = torch.arange(first, first + x.shape[0], device=x.device)
        return root.scatter(0, places, anchors[best] + first)

    def _share(self, similar: list[float], count: int, places: int) -> _Share:
        """What each frame keeps of a video whose consecutive frames are so ``similar``."""
        t = len(similar) + 1
        least = sorted(range(t - 1), key=lambda i: (similar[i], i))[: self.segments - 1]
        segments = runs(t, {*least, *(i for i in range(t - 1) if similar[i] < self.threshold)})
        ends = [[i for i in span if i == span[-1] or similar[i] < self.alike] for span in segments]
        caps = [len(e) * places for e in ends]
        budgets = share_out(min(count, sum(caps)), [len(s) for s in segments], caps)
        anchors, salient = [0] * t, [0] * t
        for span, carriers, budget in zip(segments, ends, budgets, strict=True):
            frames = carriers[::-1][:: self.anchor_every][::-1]
            # A frame that is a segment needs no room for what others bring.
            most = places if len(span) == 1 else places // 2
            number = max(1, int(budget * self.context + 1e-9))
            number = min(number, budget, most * len(frames))
            # From the last on, which thereby gets what cannot be shared evenly.
            for i, n in zip(frames[::-1], share_out(number, [1] * len(frames), most), strict=True):
                anchors[i] = n
            room = [places - anchors[i] for i in carriers]
            numbers = share_out(budget - number, [1] * len(carriers), room)
            for i, n in zip(carriers, numbers, strict=True):
                salient[i] = n
        carrying = {i for e in ends for i in e}
        others = [i for i in range(t) if i not in carrying]
        for i, n in zip(
            others, share_out(count - sum(budgets), [1] * len(others), places), strict=True
        ):
            salient[i] = n
        return _Share(segments, anchors, salient)


@dataclass(frozen=True)
class _Share:
    """The segments, and how many anchors and attended tokens each frame keeps."""

    segments: list[range]
    anchors: list[int]
    salient: list[int]
