"""Still places merged over scenes, and what is left clustered."""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.similarity import frame_means, to_steps, unit
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need
from tokenfuse.strategies._fields import Neighbours
from tokenfuse.strategies._windows import Windows, cluster_rows
from tokenfuse.tokens import VisualTokens

SMALL = 14
"""Groups of up to this many tokens are not clustered."""


class PruneVid(Budgeted):
    """Fuse places that stand still over a scene, then cluster what is left.

    Source: PruneVid, arXiv 2412.16117: its merging before the LLM. Its selection by the prompt's
    attention inside the LLM is not here.

    Density-peaks clustering of the frames' mean vectors, into ``scenes`` · T clusters, cuts the
    video into scenes. The longest runs of each cluster stay, if they have two frames or more; from
    the left on, all other frames between two of them join the longer one, the left one on ties.
    Neighbours of one cluster are one scene. A place stands still in a scene of several
    frames if the mean cosine of its tokens with one another exceeds ``threshold``; it becomes one
    token, their mean. The still tokens of a scene and the moving ones of each frame are then
    clustered, each group of more than SMALL tokens into ``clusters`` of its number. A cluster is
    the mean of its tokens.

    ``keep_ratio`` replaces ``clusters`` and SMALL: each group gets one token, if there are enough,
    and its share of the rest, by the largest remainders. A group without budget is dropped, which
    is the only case in which anything is. Where all that is left after the scenes is less than the
    budget, the still tokens least like the mean of their place stay as they are.

    What differs from the published code: any number of frames and tokens works; a scene of one
    frame has no still places, where a division by zero decides there; no cluster is empty;
    clustering is deterministic. Survivors stay in sequence order, clusters at their centre's place,
    still ones in the first frame of their scene.

    Synchronises with the host twice: to cut the video into scenes, and to count still places. Loops
    over scenes and frames.
    """

    name: ClassVar[str] = "prunevid"
    working_copies: ClassVar[float] = 6
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    paper: ClassVar[str] = "arXiv 2412.16117"

    threshold: float = Field(
        0.8, ge=-1, description="mean cosine over a scene above which a place stands still"
    )
    scenes: float = Field(0.25, gt=0, le=1, description="clusters of frames, per frame")
    clusters: float = Field(
        0.5, gt=0, le=1, description="clusters of tokens, per token, without keep_ratio"
    )
    neighbours: Neighbours = 7

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        frames, windows = self._windows(tokens)
        return windows.plan(frames, windows.quotas(count), self.neighbours, count)

    def choose_freely(self, tokens: VisualTokens) -> FusionPlan:
        frames, windows = self._windows(tokens)
        quotas = [n if n <= SMALL else max(1, int(self.clusters * n + 1e-9)) for n in windows.sizes]
        return windows.plan(frames, quotas, self.neighbours, sum(quotas))

    def _windows(self, tokens: VisualTokens) -> tuple[Float[Tensor, "T P D"], Windows]:
        frames = tokens.frames.flatten(1, 2)
        t = frames.shape[0]
        means = frame_means(frames)[None]
        several = max(1, int(self.scenes * t + 1e-9))
        valid = means.new_ones(1, t, dtype=torch.bool)
        _, label = cluster_rows(means, valid, [several], self.neighbours)
        # The first host synchronisation.
        spans = scene_runs(label[0].tolist())
        still = torch.stack([steadiness(frames[s.start : s.stop]) for s in spans]) > self.threshold
        several_frames = torch.tensor([len(s) > 1 for s in spans], device=frames.device)
        still = still & several_frames[:, None]
        # The second.
        return frames, Windows(spans, still, still.sum(1).tolist())


def scene_runs(labels: list[int]) -> list[range]:
    """The scenes of frames with these labels, in order.

    Of each label the longest runs of two frames or more stay, as many as are equally long. From the
    left on, every block of other frames joins the longer of the runs beside it, the left one on
    ties, which by then has what it was joined by; where no run stays all is one scene. Neighbours
    of one label are one scene.
    """
    found = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(n for other, n in found if other == label) for label, _ in found}
    # Label and length of what stays, None as the label of what is to join it.
    stays = [(label if n == longest[label] > 1 else None, n) for label, n in found]
    blocks = [
        (label, sum(n for _, n in run)) for label, run in groupby(stays, lambda part: part[0])
    ]
    scenes: list[tuple[int | None, int]] = []
    for (label, n), (right, after) in zip(blocks, [*blocks[1:], (None, 0)], strict=True):
        left, before = scenes[-1] if scenes else (None, 0)
        if label is None:
            label = left if before >= after else right
        if scenes and label == left:
            scenes[-1] = (left, before + n)
        else:
            scenes.append((label, n))
    starts = accumulate((n for _, n in scenes), initial=0)
    return [range(start, start + n) for start, (_, n) in zip(starts, scenes, strict=False)]


def steadiness(frames: Float[Tensor, "W P D"]) -> Float[Tensor, " P"]:
    """The mean cosine of each place's tokens with one another over ``W`` frames, fp32; 0 for one.

    From the length of their sum, with no frame compared with another. Rounded to multiples of STEP.
    A zero vector is like nothing: cosine 0.
    """
    total = torch.zeros(frames.shape[1:], device=frames.device)
    number = torch.zeros(frames.shape[1], device=frames.device)
    for frame in frames:
        units, blank = unit(frame)
        total += units
        number += ~blank
    pairs = max(1, len(frames) * (len(frames) - 1))
    mean = (total.square().sum(-1) - number) / pairs
    return to_steps(mean)
