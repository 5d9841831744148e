"""Still places merged over time, the rest thinned out by attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.select import budget, top, top_per_row
from tokenfuse.ops.similarity import nearest
from tokenfuse.ops.window import window_match
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Attending, Need
from tokenfuse.strategies._fields import KeepRatio, Neighbours
from tokenfuse.strategies._inside import Layer
from tokenfuse.strategies._layers import LayerCut, LayerTokens, WeighedPlan, fuse_weighed
from tokenfuse.strategies._windows import Windows
from tokenfuse.tokens import VisualTokens


@dataclass(frozen=True, eq=False, repr=False)
class CentredPlan(FusionPlan):
    """A plan that tells the core of each survivor from the tokens that joined it.

    ``core``: ``(N,)``, true for the survivor itself and, where its place stands still, for the
    tokens of that place in the other frames of its window.
    """

    core: Bool[Tensor, " N"]

    def join(self, x: Float[Tensor, "N D"], beta: float) -> Float[Tensor, "M D"]:
        """``beta`` · the mean of the core + (1 − ``beta``) · the mean of what joined it."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        core, others = self._mean(wide, self.core), self._mean(wide, ~self.core)
        # Without others, or their weight, a survivor is its core: the weighted sum would round.
        alone = self.count(~self.core) == 0 if beta < 1 else torch.ones_like(self.survivors).bool()
        return torch.where(alone[:, None], core, beta * core + (1 - beta) * others).to(x.dtype)

    def count(self, members: Bool[Tensor, " N"]) -> Float[Tensor, " M"]:
        """How many of ``members`` each survivor has."""
        return self._sum(members.float())

    def _mean(self, x: Tensor, members: Tensor) -> Tensor:
        total = self._sum(torch.where(members[:, None], x, 0))
        return total / self.count(members).clamp_min(1)[:, None].to(x.dtype)


class HoliTom(Attending):
    """Fuse places that stand still over windows of frames; keep the rest by attention.

    Source: HoliTom, arXiv 2505.21334. With ``inner_layer`` (18 in all of the authors' scripts) the
    visual tokens that the prompt's last token attends to least in the layer before, but a share
    ``inner_keep_ratio``, are merged there: each into the one of greatest cosine among those that
    stay, the most attended of equals.

    A place stands still from one frame to the next if the cosine of its two tokens exceeds
    ``threshold``, which that of a zero vector never does. The video is cut into the windows that
    save the most tokens if each place that stands still all through a window becomes one token
    there (dynamic programming over all cuts; among equals no window, then the shortest). Then each
    window's still tokens, as temporal means, and each frame's moving ones are thinned out by one
    ratio. Moving tokens are ranked by the attention they get in the vision tower, and the least of
    them dropped. A share ``contextual`` of a frame's tokens is chosen by density-peaks clustering
    of the less attended ones instead, and all still tokens are; of its neighbours no more tell a
    token's density than clusters are asked for. A cluster is ``beta`` · its centre + (1 − ``beta``)
    · the mean of its other tokens, where a still token counts as its temporal mean.

    What differs from the published code: the budget is exact, where it rounds per frame and spends
    too little when windows save more than is asked. Each group gets one token, if there are enough,
    and its share of the rest, by the largest remainders. Where all that is left after the
    windows is less than the budget, the still tokens least like the mean of their place stay as
    they are. Survivors stay in sequence order, still ones at their centre's place in the first
    frame of their window. ``contextual`` above 0 works, clustering is deterministic, and a video
    does not change the ratio of the next. A group without budget is dropped. Inside the LLM a row
    becomes the mean of all that it stands for, where the code halves it with each that joins, in
    order of place, so that the last one counts one half.

    Synchronises with the host once, to find the windows there. Loops over windows.
    """

    name: ClassVar[str] = "holitom"
    working_copies: ClassVar[float] = 3
    needs: ClassVar[frozenset[Need]] = frozenset({"grid", "saliency"})
    paper: ClassVar[str] = "arXiv 2505.21334"

    keep_ratio: KeepRatio = 0.5
    threshold: float = Field(
        0.8, ge=-1, description="cosine with the next frame above which a place stands still"
    )
    contextual: float = Field(
        0.0, ge=0, le=1, description="share of a frame's moving tokens kept as cluster centres"
    )
    beta: float = Field(0.6, ge=0, le=1, description="weight of a cluster's centre in its value")
    neighbours: Neighbours = 7
    inner_layer: Layer | None = Field(
        None, description="decoder layer at whose input tokens are merged again; none for nowhere"
    )
    inner_keep_ratio: KeepRatio = 0.5

    def cuts(self) -> tuple[LayerCut, ...]:
        if self.inner_layer is None:
            return ()
        return (LayerCut(self.inner_layer, self._merge, queries="last", fuse=fuse_weighed),)

    @torch.no_grad()
    def _merge(self, tokens: LayerTokens) -> FusionPlan:
        n = tokens.num_visual
        count = budget(self.inner_keep_ratio, n)
        if count == n:
            return FusionPlan.identity(n, tokens.visual.device)
        scores, states = tokens.scores(), tokens.features
        kept = top(scores, count)
        # The first of equals is the most attended.
        falling = kept[torch.argsort(scores[kept], descending=True, stable=True)]
        roots = falling[nearest(states, states[falling])[1]]
        roots[kept] = kept
        plan = FusionPlan.from_roots(kept, roots)
        return WeighedPlan(plan.survivors, plan.target, tokens.sizes.float())

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        return plan.join(x, self.beta) if isinstance(plan, CentredPlan) else plan.fuse(x)

    def choose(self, tokens: VisualTokens, count: int) -> CentredPlan:
        frames = tokens.frames.flatten(1, 2)
        t, places = frames.shape[:2]
        index = torch.arange(t, device=frames.device)
        before = window_match(tokens.frames, (index - 1).clamp_min(0), 1)[0].flatten(1)
        begins = still_since(before[1:] > self.threshold)
        # The one host synchronisation.
        numbers = still_places(begins).tolist()
        spans = best_windows(numbers)
        first = torch.tensor([span.start for span in spans], device=frames.device)
        last = torch.tensor([span[-1] for span in spans], device=frames.device)
        windows = Windows(
            spans,
            (begins[last] <= first[:, None]) & (last > first)[:, None],
            [numbers[s.start][s[-1]] if len(s) > 1 else 0 for s in spans],
        )
        quotas = windows.quotas(count)
        of_frames = quotas[len(spans) :]
        dominant = [round(k * (1 - self.contextual)) for k in of_frames]
        saliency = tokens.needed("saliency").to(torch.float32).view(t, places)
        salient = top_per_row(
            saliency.masked_fill(~windows.moving, -torch.inf),
            torch.tensor(dominant, device=frames.device),
        )
        contextual = [k - d for k, d in zip(of_frames, dominant, strict=True)]
        plan = windows.plan(
            frames, quotas, self.neighbours, count, salient, contextual, few_neighbours=True
        )
        own = plan.survivors[plan.target.clamp_min(0)] % places
        core = own == torch.arange(t * places, device=own.device) % places
        return CentredPlan(plan.survivors, plan.target, core)


def still_since(still: Bool[Tensor, "steps P"]) -> Tensor:
    """The frame since which each place has stood still, ``(steps + 1, P)`` long.

    ``still[t]``: whether the places do so from frame ``t`` to the next.
    """
    after = torch.arange(1, still.shape[0] + 1, device=still.device)[:, None]
    moved = torch.where(still, 0, after)
    return torch.cat([moved.new_zeros(1, still.shape[1]), moved]).cummax(0).values


def still_places(since: Tensor) -> Tensor:
    """How many places stand still from frame ``s`` to frame ``e``, ``(T, T)`` long, at ``[s, e]``.

    ``since``: as ``still_since`` gives it. Entries with ``e < s`` mean nothing.
    """
    t = since.shape[0]
    moved = torch.zeros(t, t, dtype=torch.long, device=since.device)
    return moved.scatter_add_(1, since, torch.ones_like(since)).cumsum(1).mT


def best_windows(numbers: list[list[int]]) -> list[range]:
    """The windows of frames that save the most tokens, in order.

    ``numbers[s][e]``: how many places stand still from frame ``s`` to frame ``e``; a window saves
    that many tokens in each of its frames but one.
    """
    # For the frames up to each: the most that can be saved, and where the last window begins.
    saved: list[int] = []
    begin: list[int] = []
    for e in range(len(numbers)):
        best, at = (saved[e - 1] if e else 0), e
        # From the shortest on, of which the first of equals stays.
        for s in reversed(range(e)):
            value = (saved[s - 1] if s else 0) + numbers[s][e] * (e - s)
            if value > best:
                best, at = value, s
        saved.append(best)
        begin.append(at)
    spans = []
    stop = len(numbers)
    while stop:
        spans.append(range(begin[stop - 1], stop))
        stop = begin[stop - 1]
    return spans[::-1]
