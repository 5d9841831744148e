"""DivPrune."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenfuse.ops import CHUNK
from tokenfuse.ops.select import budget
from tokenfuse.ops.similarity import Cosines, to_steps
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, warn_of_pairs
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.tokens import Grid, VisualTokens


class DivPrune(Budgeted):
    """Keep tokens that lie as far from each other as possible and drop the rest.

    Source: DivPrune, arXiv 2503.02175. The distance of two tokens is 1 − cosine. The first pick is
    the token whose nearest other token is farthest; each further one is the token farthest from
    all picked so far (lowest index on ties), so that a smaller budget keeps a part of what a larger
    one keeps.

    The published code does not mask what it has picked, so that among duplicates it picks the same
    token again and keeps fewer than asked for; here picks are unique. It rounds the share, this
    rounds up. It gathers all distances to all picks anew at each pick; here one row is added to a
    running minimum. A blank (zero) vector has no direction: it is picked after all others.

    The only native parameter is the share. Every pair is compared once for the first pick; all
    cosines are held where there are no more than CHUNK, otherwise each pick is compared with all
    tokens once more. The loop over picks is sequential by definition. Never synchronises with the
    host.
    """

    name: ClassVar[str] = "divprune"
    working_copies: ClassVar[float] = 2.1
    paper: ClassVar[str] = "arXiv 2503.02175"

    keep_ratio: KeepRatio = 0.098

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        warn_of_pairs(self, tokens)
        picks = farthest_first(tokens.features, count)
        return FusionPlan.from_survivors(picks.sort().values, tokens.num_tokens)

    def matching_flops(self, grid: Grid, width: int) -> int:
        n = prod(grid)
        compared = n * (n - 1) // 2
        if n * n > CHUNK:
            compared += (budget(self.keep_ratio, n) - 1) * n
        return compared * width


def farthest_first(x: Float[Tensor, "N D"], count: int) -> Int[Tensor, " M"]:
    """The ``count`` tokens that DivPrune picks, in the order it picks them."""
    cosines = Cosines(x, hold=x.shape[0] ** 2 <= CHUNK)
    # Cosine with the nearest token picked; nothing is nearer than a blank one.
    closest = torch.full_like(cosines.units[:, 0], -torch.inf)
    closest.masked_fill_(cosines.blank, 2)
    picks = torch.empty(count, dtype=torch.long, device=x.device)
    pick = torch.maximum(closest, to_steps(cosines.nearest())).argmin(0, keepdim=True)
    picks[:1] = pick
    for i in range(1, count):
        closest = torch.maximum(closest, to_steps(cosines.row(pick)))
        closest.index_fill_(0, pick, torch.inf)
        # Of equals, argmin is the first.
        pick = closest.argmin(0, keepdim=True)
        picks[i : i + 1] = pick
    return picks
