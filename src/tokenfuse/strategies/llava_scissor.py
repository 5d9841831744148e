"""LLaVA-Scissor: connected components of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenfuse.ops import CHUNK
from tokenfuse.ops.select import true_indices
from tokenfuse.ops.similarity import NO_MATCH, STEP, nearest, rowwise, unit
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need, warn_of_pairs
from tokenfuse.tokens import Grid, VisualTokens


@dataclass(frozen=True, eq=False, repr=False)
class ComponentPlan(FusionPlan):
    """A plan that remembers the components whose means its survivors start from.

    ``within``: the plan that puts tokens into the components of their frames. ``across``: the plan
    that puts those into components over all frames. ``order (M,)``: the component over all frames
    that each survivor stands for.
    """

    within: FusionPlan
    across: FusionPlan
    order: Tensor

    def components(self, x: Tensor) -> Tensor:
        """The component token of each survivor: the mean of its frame components' means, wide."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.across.fuse(self.within.fuse(wide))[self.order]


class LLaVAScissor(Budgeted):
    """Fuse tokens into connected components of similar tokens, within frames and across them.

    Source: LLaVA-Scissor, arXiv 2506.21862. Tokens of a frame are linked where their cosine exceeds
    ``threshold``; each connected component becomes its mean. The means of all frames are linked and
    averaged once more, which gives the component tokens. Then every original token joins the
    component token with the greatest cosine, and a component token is averaged with all that joined
    it, counting itself as one. Links are transitive: two tokens of a component need not be alike.
    A zero vector is like nothing and stays alone, and ``threshold >= 1`` keeps everything.

    ``keep_ratio`` lowers or raises the threshold to where exactly ⌈keep_ratio · N⌉ components are
    left: the links that join components are made in order of falling cosine, first those above
    ``threshold`` within the frames, then, as far as the budget demands, those across frames,
    however low. Zero vectors are linked last, without regard to their frames.

    What differs from the published code: components are exact, where it samples tokens at random
    and loses some that no sample reaches; and survivors have places, where it numbers them anew. A
    survivor stands at the member of its component that is most like the component token (lowest
    index on ties), and that member joins it whatever else it is like.

    Across frames all pairs are compared, in chunks, so that time is quadratic and memory is not:
    from MANY tokens of an item on a SlowWarning says so before it begins. Synchronises with the
    host once per round of linking and of joining components, each of them about the logarithm of
    the size of the greatest component, and once or twice to count.
    """

    name: ClassVar[str] = "llava_scissor"
    working_copies: ClassVar[float] = 8
    needs: ClassVar[frozenset[Need]] = frozenset({"grid"})
    paper: ClassVar[str] = "arXiv 2506.21862"

    threshold: float = Field(0.9, ge=-1, description="cosine above which two tokens are linked")

    def num_kept(self, grid: Grid) -> int | None:
        if self.keep_ratio is None and (self.threshold >= 1 or prod(grid) == 1):
            return prod(grid)
        return super().num_kept(grid)

    def matching_flops(self, grid: Grid, width: int) -> int:
        """One comparison of every two tokens of a frame; all else depends on the content."""
        t, h, w = grid
        return t * (h * w) ** 2 * width

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        if not isinstance(plan, ComponentPlan):
            return plan.fuse(x)
        start = plan.components(x)
        joined = plan.fuse(x.to(start.dtype))
        # A mean of n and one more.
        return (joined + (start - joined) / (plan.sizes + 1)[:, None]).to(x.dtype)

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        return self._plan(tokens, count)

    def choose_freely(self, tokens: VisualTokens) -> FusionPlan:
        return self._plan(tokens, None)

    def _plan(self, tokens: VisualTokens, count: int | None) -> FusionPlan:
        warn_of_pairs(self, tokens)
        x = tokens.features.to(torch.float32)
        within = _components(tokens.frames.flatten(1, 2), self.threshold, count)
        means = within.fuse(x)
        across = _components(means[None], self.threshold if count is None else -inf, count)
        component = across.target[within.target]
        survivors, slots = _representatives(x, across.fuse(means), component)
        order = survivors.sort().indices
        rank = torch.argsort(order)
        return ComponentPlan(survivors[order], rank[slots], within, across, order)


def _representatives(x: Tensor, y: Tensor, component: Tensor) -> tuple[Tensor, Tensor]:
    """The token where each component token ``y (C, D)`` stands, and which one each token joins."""
    n, device = x.shape[0], x.device
    best, slots = nearest(x, y)
    slots = torch.where(best == NO_MATCH, component, slots)
    own = rowwise(x, y[component])
    greatest = own.new_full((y.shape[0],), -inf).scatter_reduce(0, component, own, "amax")
    index = torch.arange(n, device=device)
    candidates = torch.where(own == greatest[component], index, n)
    stands = index.new_full((y.shape[0],), n).scatter_reduce(0, component, candidates, "amin")
    return stands, slots.scatter(0, stands, torch.arange(y.shape[0], device=device))


def _components(frames: Tensor, threshold: float, count: int | None) -> FusionPlan:
    """Tokens into the components that links above ``threshold`` make, ``frames (F, n, D)``.

    With ``count``, only the strongest links are made, so that no fewer components are left; those
    of the lowest tokens on ties.
    """
    n = frames.shape[0] * frames.shape[1]
    if n == count:
        return FusionPlan.identity(n, frames.device)
    weight, one, other = _spanning_links(frames, threshold)
    if count is not None:
        # Slots without a link are last, and go nowhere.
        tied = torch.argsort(torch.minimum(one, other) * n + torch.maximum(one, other))
        made = tied[torch.argsort(weight[tied], descending=True, stable=True)[: n - count]]
        one, other = one[made], other[made]
    index = torch.arange(n, device=frames.device)
    roots = _join(index, one, other)
    return FusionPlan.from_roots(true_indices(roots == index, int((roots == index).sum())), roots)


def _join(index: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The lowest token of the component of each token, by links between ``one`` and ``other``."""
    roots = index
    while True:
        a, b = roots[one], roots[other]
        lower = index.scatter_reduce(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        joined = _ends(lower)[roots]
        if torch.equal(joined, roots):
            return roots
        roots = joined


def _ends(step: Tensor) -> Tensor:
    """Where following ``step`` from each place ends, in a forest whose roots step to themselves."""
    for _ in range((step.shape[0] - 1).bit_length()):
        step = step[step]
    return step


def _spanning_links(frames: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """A forest of greatest cosine over each frame's links above ``threshold`` (Borůvka).

    Returns the weights and ends of ``N`` links; those of weight -inf link a token with itself.
    Links above any greater threshold, and any number of the strongest, make the components that all
    links above it, or that many merges in order of weight, would.
    """
    n = frames.shape[0] * frames.shape[1]
    products = _Products(unit(frames)[0])
    index = torch.arange(n, device=frames.device)
    weight = torch.full((n,), -inf, device=frames.device)
    one, other, roots = index, index, index
    while True:
        found, match = products.strongest(roots)
        # Equal weights are ordered by their ends, for both ends alike: so links form no cycle.
        ends = torch.minimum(index, match) * n + torch.maximum(index, match)
        best = torch.full_like(weight, -inf).scatter_reduce(0, roots, found, "amax")
        ends = torch.where(found == best[roots], ends, n * n)
        ends = torch.full_like(index, n * n).scatter_reduce(0, roots, ends, "amin")
        a, b = (ends // n).clamp_max(n - 1), ends % n
        linked = best > threshold
        to = torch.where(linked, torch.where(roots[a] == index, roots[b], roots[a]), index)
        # Where two components choose each other they choose one link: the higher takes it.
        linked &= (to[to] != index) | (index > to)
        to = torch.where(linked, to, index)
        # Rounding may have made a pair's two cosines differ: links downwards form no cycle at all.
        last = _ends(to)
        linked &= (to[last] == last) | (index > to)
        if not bool(linked.any()):
            return weight, one, other
        weight = torch.where(linked, best, weight)
        one, other = torch.where(linked, a, one), torch.where(linked, b, other)
        roots = _ends(torch.where(linked, to, index))[roots]


class _Products:
    """Cosines of the tokens of each frame, in units of STEP, held where they fit into CHUNK.

    ``units (F, n, D)``: tokens of length 1, or 0. Cosines are rounded as elsewhere, and NO_MATCH
    with a zero vector.
    """

    def __init__(self, units: Tensor) -> None:
        self.units, self.sound = units, units.any(-1)
        self._bias = torch.where(self.sound, 0.0, NO_MATCH / STEP)
        count, places, _ = units.shape
        rows = max(1, min(places, CHUNK // places))
        self._block = max(1, CHUNK // (rows * places))
        self._rows = [slice(i, i + rows) for i in range(0, places, rows)]
        fits = count * places**2 <= CHUNK
        self._held = self._of(slice(None), slice(None)) if fits else None

    def _of(self, frames: slice, rows: slice) -> Tensor:
        own = self.units[frames]
        return torch.baddbmm(self._bias[frames, None], own[:, rows] / STEP, own.mT).round_()

    def strongest(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """The greatest cosine of each token with any of another component of its frame, and which.

        ``-inf`` where there is no other component. The lowest index on ties.
        """
        count, places, _ = self.units.shape
        own = roots.view(count, places)
        best, match = [], []
        for f in range(0, count, self._block):
            there = slice(f, f + self._block)
            found = []
            for part in self._rows:
                same = own[there, part, None] == own[there, None]
                if self._held is None:
                    similar = self._of(there, part).masked_fill_(same, -inf)
                else:
                    similar = self._held.masked_fill(same, -inf)
                found.append(similar.max(-1))
            best.append(torch.cat([values for values, _ in found], 1))
            match.append(torch.cat([index for _, index in found], 1))
        values = torch.cat(best) * STEP
        shift = torch.arange(count, device=values.device)[:, None] * places
        values = torch.where(self.sound, values, values.clamp_max(NO_MATCH))
        return values.flatten(), (torch.cat(match) + shift).flatten()
