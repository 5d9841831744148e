"""FrameFusion."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tokenfuse.ops.select import top
from tokenfuse.ops.similarity import NO_MATCH, rowwise
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Stage, Strategy
from tokenfuse.strategies._inside import Layer
from tokenfuse.strategies._layers import LayerCut, LayerTokens, WeighedPlan, fuse_weighed
from tokenfuse.tokens import VisualTokens

Phase = Literal["merge", "prune", "done"]


class FrameFusion(Strategy):
    """Merge tokens with the same place of the frame before, layer by layer, then prune once.

    Source: FrameFusion, arXiv 2501.01986. ``cost`` is the share of visual tokens that a layer
    reads, on average over all layers. At each layer, the first of which is the input of the
    LLM, tokens are compared with the one that is left of the same place in an earlier frame. Those
    whose cosine is ``threshold`` or more join it, a run of them together. As soon as that would
    undercut the cost, only the most alike are merged, as many as it takes, and all is done. Where
    less than a share ``least`` is alike, or at ``last_layer``, merging ends, and at the next layer
    (at that one) the tokens that get the least attention from all others, mean over heads, are
    dropped down to what the cost allows.

    What differs from the published code: sums are fp32 and weigh what was merged before by what it
    stands for; a token is not merged with one of another item. Merging ends at ``last_layer``
    whatever is alike, so that attention is read there at the latest. A cost that layers so far have
    spent already leaves one token. As published each token of a run is compared with its neighbour
    only, so that a place that changes slowly becomes one token, however far it has come;
    ``link: first`` compares it with the first of the run instead.

    Before the LLM it synchronises with the host once for each item, inside once for each prompt and
    layer; with ``link: first`` once more for each time that a run is parted.
    """

    name: ClassVar[str] = "framefusion"
    stage: ClassVar[Stage] = "pre_llm"
    paper: ClassVar[str] = "arXiv 2501.01986"

    cost: float = Field(
        0.3, gt=0, le=1, description="share of the visual tokens that a layer reads, on average"
    )
    threshold: float = Field(
        0.6, ge=-1, description="cosine with the same place of an earlier frame to merge from"
    )
    least: float = Field(
        0.1, ge=0, le=1, description="share of alike tokens below which merging ends"
    )
    last_layer: Layer = 4
    link: Literal["neighbour", "first"] = Field(
        "neighbour", description="what a token of a run is compared with: the one before, the first"
    )

    def at_share(self, share: float, layers: int) -> Self:
        return self.with_options(cost=share, last_layer=min(self.last_layer, layers - 1))

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        return fuse_weighed(plan, x)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens) -> FusionPlan:
        n = tokens.num_tokens
        item = torch.zeros_like(tokens.coords[:, 0])
        weight = torch.ones_like(item).float()
        return self.merged(
            tokens.features, tokens.coords, item, weight, int((1 - self.cost) * n + 1e-9)
        )

    def cuts(self) -> tuple[LayerCut, ...]:
        return tuple(
            LayerCut(layer, self._inside, queries="all", asks=self._prunes, fuse=fuse_weighed)
            for layer in range(1, self.last_layer + 1)
        )

    def merged(
        self,
        features: Float[Tensor, "N D"],
        coords: Int[Tensor, "N 3"],
        item: Int[Tensor, " N"],
        weight: Float[Tensor, " N"],
        most: int,
    ) -> FusionPlan:
        """The plan that merges alike tokens, ``most`` of them. One host synchronisation."""
        n, device = features.shape[0], features.device
        similar, order = same_place(features, coords, item)
        if self.link == "first":
            similar = self._with_first(features[order], similar[order])[order.argsort()]
        alike = similar >= self.threshold
        count = int(alike.sum())
        if count > most:
            count = most
            alike = torch.zeros_like(alike).index_fill(0, top(similar, most), True)
        if not count:
            return FusionPlan.identity(n, device)
        # In order of places, a token that joins goes with the last one that does not.
        own = torch.arange(n, device=device)
        heads = torch.where(alike[order], 0, own).cummax(0).values
        roots = torch.empty_like(own).scatter(0, order, order[heads])
        survivors = torch.argsort(alike.to(torch.uint8), stable=True)[: n - count]
        plan = FusionPlan.from_roots(survivors, roots)
        return WeighedPlan(plan.survivors, plan.target, weight)

    def _with_first(self, x: Tensor, similar: Tensor) -> Tensor:
        """The cosine of each token with the first of its run, in order of places."""
        own = torch.arange(x.shape[0], device=x.device)
        while True:
            alike = similar >= self.threshold
            heads = torch.where(alike, 0, own).cummax(0).values
            cosines = torch.where(alike, rowwise(x, x[heads]), NO_MATCH)
            far = alike & (cosines < self.threshold)
            if not bool(far.any()):
                return cosines
            # The first of a run that is too far begins the next one.
            count = far.cumsum(0)
            begins = far & (count - count[heads] == 1)
            similar = similar.masked_fill(begins, NO_MATCH)

    @torch.no_grad()
    def _inside(self, tokens: LayerTokens) -> FusionPlan:
        n = tokens.num_visual
        phase, share = self.phase(tokens.counts, tokens.original, tokens.num_layers)
        if phase == "merge":
            most = int(share * n + 1e-9)
            weight = tokens.sizes.float()
            return self.merged(tokens.features, tokens.coords, tokens.item, weight, most)
        kept = max(1, round(n * (1 - share)))
        if phase == "done" or kept >= n:
            return FusionPlan.identity(n, tokens.visual.device)
        assert tokens.received is not None
        return FusionPlan.from_survivors(top(tokens.received[tokens.visual], kept), n)

    def _prunes(self, counts: tuple[int, ...], original: int, layers: int) -> bool:
        """Whether the next layer prunes, so that it reads attention."""
        return self.phase(counts, original, layers)[0] == "prune"

    def phase(self, counts: tuple[int, ...], original: int, layers: int) -> tuple[Phase, float]:
        """What the next layer does, and what share of its tokens may go.

        ``counts``: how many tokens each layer so far has read of the ``original`` ones.
        """
        phase: Phase = "merge"
        shares: list[float] = []
        before = original
        for layer, count in enumerate(counts):
            allowed = share_to_remove(shares, self.cost, layers)
            shares.append(1 - count / before)
            if phase == "prune" or before - count >= int(allowed * before + 1e-9):
                phase = "done"
            elif phase == "merge" and (shares[-1] < self.least or layer >= self.last_layer - 1):
                phase = "prune"
            before = count
        return phase, share_to_remove(shares, self.cost, layers)


def same_place(
    features: Float[Tensor, "N D"], coords: Int[Tensor, "N 3"], item: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """The cosine of each token with the one before it at its place, and the order by places.

    NO_MATCH for the first at each place.
    """
    # Frames rise already: a stable sort by item, row and column.
    side = coords.amax() + 1
    key = (item * side + coords[:, 1]) * side + coords[:, 2]
    order = torch.argsort(key, stable=True)
    sorted_key, x = key[order], features[order]
    cosines = rowwise(x[1:], x[:-1])
    first = sorted_key[1:] != sorted_key[:-1]
    cosines = torch.cat([cosines.new_full((1,), NO_MATCH), cosines.masked_fill(first, NO_MATCH)])
    return torch.empty_like(cosines).scatter(0, order, cosines), order


def share_to_remove(shares: list[float], cost: float, layers: int) -> float:
    """The share of the present tokens that may go, so that all layers together meet the cost.

    ``shares``: what share each layer so far has removed of what it was given. A layer reads what is
    left after its own removal.
    """
    left, spent = 1.0, 0.0
    for share in shares:
        left *= 1 - share
        spent += left
    allowed = max(0.0, layers * cost - spent)
    return max(0.0, 1 - allowed / ((layers - len(shares)) * left))
