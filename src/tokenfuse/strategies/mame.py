"""A reconstruction of MaMe, matrix-based token merging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor, inf, prod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenfuse.ops import CHUNK
from tokenfuse.ops.select import top, true_indices
from tokenfuse.ops.similarity import NO_MATCH, STEP, nearest_per_row, unit
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, warn_of_pairs
from tokenfuse.tokens import Grid, VisualTokens

EXACT = 128
"""How many cosines, in units of STEP, are summed without rounding in fp32."""


@dataclass(frozen=True, eq=False)
class MergeRound:
    """One round of soft merging: every other token may go, into several of those between.

    ``metric (n, D)``: the features that decide, before this round. ``gone``: odd indices of the
    tokens that are merged. ``plan``: each merged token with its nearest destination.

    The weights of a round, half by half of its tokens, are too many to keep; they are made again
    from ``metric``, part by part, whenever the round is applied.
    """

    metric: Tensor
    gone: Tensor
    plan: FusionPlan
    threshold: float

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of ``gone``, and the share of each that goes to each destination, fp32.

        Destinations are the even indices; the shares of a token sum to 1.
        """
        count = (self.metric.shape[0] + 1) // 2
        # Zeros are like nothing.
        keys = torch.nn.functional.pad(self.metric[::2], (0, 0, 0, -count % EXACT))
        keys, blank = unit(keys)
        bias = torch.where(blank, NO_MATCH / STEP, 0.0)
        threshold = self.threshold / STEP
        least = floor(threshold)
        for part in self.gone.split(max(1, CHUNK // 16 // keys.shape[0])):
            queries, lost = unit(self.metric[part])
            # Whole numbers of STEP; clamping tells which are greater, faster than comparing.
            similar = torch.addmm(bias, queries / STEP, keys.T).round_()
            links = (similar - least).clamp_(0, 1).sum(-1)
            linked = torch.threshold(similar, least, 0).unflatten(-1, (-1, EXACT))
            total = linked.sum(-1).to(torch.float64).sum(-1)
            # At least the mean of all links.
            cut = torch.where(lost | (links == 0), inf, (total / links).ceil()).float()[:, None]
            weight = (similar - (cut - 1)).clamp_(0, 1).mul_(similar - threshold)[:, :count]
            total = weight.sum(-1, keepdim=True)
            # What has no link goes to its nearest destination.
            nearest = self.plan.survivors[self.plan.target[part]] // 2
            alone = torch.where(total > 0, 0.0, 1.0)
            yield part, weight.scatter_add_(1, nearest[:, None], alone).div_(total + alone)

    def apply(self, x: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Wide features ``(n, D')`` and how many tokens each stands for ``(n,)``, after the round.

        The sum of mass times feature stays.
        """
        total, more = torch.zeros_like(x[::2]), torch.zeros_like(mass[::2])
        for part, share in self.weights():
            given = share.to(x.dtype).T
            total = torch.addmm(total, given, mass[part, None] * x[part])
            more = torch.addmv(more, given, mass[part])
        heavier = mass[::2] + more
        # A change, so that what absorbs nothing stays as it is, to the bit.
        change = (total - more[:, None] * x[::2]) / heavier[:, None]
        index = torch.arange(0, x.shape[0], 2, device=x.device)
        x, mass = x.index_add(0, index, change), mass.index_copy(0, index, heavier)
        return self.plan.select(x), self.plan.select(mass)


@dataclass(frozen=True, eq=False, repr=False)
class SoftPlan(FusionPlan):
    """A plan with the rounds of soft merging that it sums up.

    A token's ``target`` is where the greatest share of it went, and ``sizes`` count by that.
    """

    rounds: tuple[MergeRound, ...]

    def merged(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The survivors' features, wide, and how many tokens each holds, fractions included."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mass = wide.new_ones(wide.shape[0])
        for step in self.rounds:
            wide, mass = step.apply(wide, mass)
        return wide, mass


class MaMe(Budgeted):
    """Merge every other token into all the tokens between that are like it, by soft weights.

    A RECONSTRUCTION, NOT THE AUTHORS' METHOD. Source: MaMe, arXiv 2604.13432, of which no code was
    ever published; this was rebuilt from descriptions and has been compared with nothing. Do not
    report its results as those of the paper.

    Tokens at even indices are destinations, those at odd ones sources. A source is linked to the
    destinations whose cosine with it exceeds ``threshold``, with weights of what exceeds it. Links
    below the mean weight of their source are cut, and those left are scaled to sum to 1. A
    destination becomes the mean of itself and of what it is given, by weight, so that the sum of
    all tokens stays. A source without links stays as it is. A zero vector is like nothing, and
    ``threshold >= 1`` keeps everything.

    ``keep_ratio`` merges the sources with the greatest cosine to any destination (lowest index on
    ties), as many as leave exactly ⌈keep_ratio · N⌉ tokens. Where more than half must go, all
    sources are merged and the survivors, with what each stands for, are split again. A source
    that must go without a link above ``threshold`` goes to its nearest destination alone.

    What differs from the published description: it merges once before the LLM (or in the rounds of
    ``keep_ratio``), where the method merges in the first blocks of a vision transformer; a link is
    cut if its weight is below the mean, where subtracting the mean would erase the only link of a
    source, and equal links; items do not share what they keep. That even indices are destinations,
    that destinations are averaged, and that features are compared are guesses.

    Sources are compared with all destinations: from MANY tokens of an item on a SlowWarning says so
    before it begins. A plan holds the features it was made of, since weights are made again for
    each tensor that it is applied to. Synchronises with the host once, to count, and never with
    ``keep_ratio``.
    """

    name: ClassVar[str] = "mame"
    working_copies: ClassVar[float] = 6.5
    paper: ClassVar[str] = "arXiv 2604.13432"
    experimental: ClassVar[bool] = True

    threshold: float = Field(0.8, ge=-1, le=10, description="cosine above which a source is linked")

    def num_kept(self, grid: Grid) -> int | None:
        if self.keep_ratio is None and (self.threshold >= 1 or prod(grid) == 1):
            return prod(grid)
        return super().num_kept(grid)

    def matching_flops(self, grid: Grid, width: int) -> int:
        """Of the plan alone; applying it compares the merged tokens once more."""
        n = prod(grid)
        count = self.num_kept(grid) or (n + 1) // 2
        pairs = 0
        while n > count:
            pairs += (n // 2) * (n - n // 2)
            n = max(count, n - n // 2)
        return pairs * width

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        if not isinstance(plan, SoftPlan):
            return plan.fuse(x)
        return plan.merged(x)[0].to(x.dtype)

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        warn_of_pairs(self, tokens)
        x = tokens.features.detach().to(torch.float32)
        mass = x.new_ones(x.shape[0])
        whole = FusionPlan.identity(x.shape[0], x.device)
        rounds: list[MergeRound] = []
        while True:
            best, match = _nearest(x)
            gone = top(best, min(x.shape[0] - count, best.shape[0]))
            step = self._round(x, gone, match)
            rounds.append(step)
            whole = whole.compose(step.plan)
            if step.plan.num_kept == count:
                return SoftPlan(whole.survivors, whole.target, tuple(rounds))
            x, mass = step.apply(x, mass)

    def choose_freely(self, tokens: VisualTokens) -> FusionPlan:
        warn_of_pairs(self, tokens)
        x = tokens.features.detach()
        if x.shape[0] == 1:
            return FusionPlan.identity(1, x.device)
        best, match = _nearest(x)
        linked = best > self.threshold
        # The one host synchronisation: how many are merged.
        gone = true_indices(linked, int(linked.sum()))
        step = self._round(x, gone, match)
        return SoftPlan(step.plan.survivors, step.plan.target, (step,))

    def _round(self, x: Tensor, gone: Tensor, match: Tensor) -> MergeRound:
        """The round that merges the sources ``gone``, the greatest share into ``match``."""
        n = x.shape[0]
        index = torch.arange(n, device=x.device)
        roots = index.scatter(0, 2 * gone + 1, 2 * match[gone])
        survivors = true_indices(roots == index, n - gone.shape[0])
        return MergeRound(x, 2 * gone + 1, FusionPlan.from_roots(survivors, roots), self.threshold)


def _nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest cosine of each source with a destination, and which."""
    best, match = nearest_per_row(x[None, 1::2], x[None, ::2])
    return best[0], match[0]
