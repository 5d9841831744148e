"""Merging inside windows of frames: places that stand still over time, the rest frame by frame.

A window is a run of frames. Each of its places either stands still, and is then one token for the
whole window, or moves, and has a token in every frame. Within a window the still places are one
group, and the moving places of each frame are another; groups are then thinned out separately.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenfuse.ops.apportion import apportion
from tokenfuse.ops.cluster import density_clusters
from tokenfuse.ops.select import true_indices
from tokenfuse.ops.similarity import rowwise
from tokenfuse.plan import DROPPED, FusionPlan


def share_out(total: int, weights: list[int], most: list[int] | int, least: int = 0) -> list[int]:
    """``apportion`` for Python numbers, on the CPU."""
    if not weights:
        return []
    caps = most if isinstance(most, int) else torch.tensor(most, device="cpu")
    return apportion(torch.tensor(weights, device="cpu"), total, caps, least).tolist()


def runs(frames: int, cuts: set[int]) -> list[range]:
    """The frames in runs that end after each frame of ``cuts``."""
    ends = [t + 1 for t in sorted(cuts) if 0 <= t < frames - 1]
    return [range(start, stop) for start, stop in pairwise([0, *ends, frames])]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a video of ``P`` places per frame, in order, and which places stand still.

    ``numbers``: how many places of each window stand still. Groups are numbered: the still places
    of each window first, then the moving ones of each frame.
    """

    spans: list[range]
    still: Bool[Tensor, "W P"]
    numbers: list[int]

    @cached_property
    def sizes(self) -> list[int]:
        """How many tokens each group has after still places became one token each."""
        places = self.still.shape[1]
        moving = [
            places - n for n, span in zip(self.numbers, self.spans, strict=True) for _ in span
        ]
        return self.numbers + moving

    @cached_property
    def moving(self) -> Bool[Tensor, "T P"]:
        lengths = [len(span) for span in self.spans]
        return torch.cat([~row.expand(k, -1) for row, k in zip(self.still, lengths, strict=True)])

    def quotas(self, count: int) -> list[int]:
        """``count`` tokens for the groups in proportion to their sizes, one each at least.

        The largest remainders get what rounding leaves, the earliest on ties.
        """
        return share_out(count, self.sizes, self.sizes, least=1)

    def plan(
        self,
        frames: Float[Tensor, "T P D"],
        quotas: list[int],
        neighbours: int,
        count: int,
        salient: Bool[Tensor, "T P"] | None = None,
        contextual: list[int] | None = None,
        few_neighbours: bool = False,
    ) -> FusionPlan:
        """The plan with ``quotas`` survivors of each group, ``count`` in all.

        A group of still places becomes clusters of temporal means. In a frame the ``salient``
        tokens (none by default) stay as they are, and the rest becomes ``contextual`` clusters (by
        default its whole quota). A group, or rest of one, with no cluster is dropped. A token of
        still places has its centre's place in the first frame of the window.

        ``few_neighbours``: in a group of fewer clusters than ``neighbours`` as many neighbours as
        clusters tell how dense a token's surroundings are.

        If ``count`` is more than the quotas' sum, still tokens leave the temporal mean of their
        place to stand for themselves, those least like the mean first (lowest index on ties).
        """
        t, places = frames.shape[:2]
        index = torch.arange(t * places, device=frames.device).view(t, places)
        clusters = quotas[len(self.spans) :] if contextual is None else contextual
        pool = self.moving if salient is None else self.moving & ~salient
        kept, home = cluster_rows(frames, pool, clusters, neighbours, few_neighbours)
        root = torch.where(home < 0, DROPPED, home + index[:, :1])
        if salient is not None:
            kept = kept | salient
            root = torch.where(salient, index, root)

        extra = count - sum(quotas)
        likeness = torch.full_like(root, 4, dtype=torch.float32)
        quotas = quotas[: len(self.spans)]
        for number, quota, span, still in zip(
            self.numbers, quotas, self.spans, self.still, strict=True
        ):
            if not quota:
                continue
            inside, first = slice(span.start, span.stop), span.start * places
            mean = frames[inside].mean(0, dtype=torch.float32)
            if quota < number:
                centres, places_of = cluster_rows(
                    mean[None], still[None], [quota], neighbours, few_neighbours
                )
                centres, places_of = centres[0], places_of[0]
            else:
                centres, places_of = still, index[0]
            kept[span.start] |= centres
            root[inside] = torch.where(still, places_of + first, root[inside])
            for frame in span[1:] if extra else []:
                similar = rowwise(frames[frame], mean)
                likeness[frame] = torch.where(still, similar, likeness[frame])
        if extra:
            alone = torch.argsort(likeness.flatten(), stable=True)[:extra]
            kept = kept.flatten().index_fill(0, alone, True)
            root = root.flatten().scatter(0, alone, alone)
        return FusionPlan.from_roots(true_indices(kept.flatten(), count), root.flatten())


def cluster_rows(
    points: Float[Tensor, "F n D"],
    valid: Bool[Tensor, "F n"],
    counts: list[int],
    neighbours: int,
    few_neighbours: bool = False,
) -> tuple[Bool[Tensor, "F n"], Int[Tensor, "F n"]]:
    """``counts[i]`` density-peak centres of the valid points of row ``i``.

    Returns which points are centres, and the index in its row of the centre that each point belongs
    to: -1 for a point that is not valid, or in a row of count 0. ``few_neighbours``: a row of fewer
    centres than ``neighbours`` has as many neighbours as centres.
    """
    centres = torch.zeros_like(valid)
    home = torch.full(valid.shape, DROPPED, dtype=torch.long, device=points.device)
    rows = [i for i, count in enumerate(counts) if count]
    if not rows:
        return centres, home
    some = torch.tensor(rows, device=points.device)
    chosen = torch.tensor([counts[i] for i in rows], device=points.device)
    x, mask = (points, valid) if len(rows) == len(counts) else (points[some], valid[some])
    most = chosen if few_neighbours else None
    best, own = density_clusters(x, mask, chosen, neighbours, most)
    own = torch.where(mask, own, DROPPED)
    return centres.index_copy(0, some, best), home.index_copy(0, some, own)
