"""CDPruner."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import threshold

from tokenfuse.ops import CHUNK
from tokenfuse.ops.select import budget, top
from tokenfuse.ops.similarity import Cosines, to_steps, unit
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Need, warn_of_pairs
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.tokens import Grid, VisualTokens

EPSILON = 1e-6
"""What the least relevant token is worth."""

DEPENDENT = 2.0**-14
"""Share of a token that must be new, or it counts as a combination of those picked before."""

HOLD_FROM = 16
"""All cosines at once are cheaper than a row per pick if more than one token in this many stays."""


class CDPruner(Budgeted):
    """Keep tokens that are relevant to the prompt and differ from each other, and drop the rest.

    Source: CDPruner, arXiv 2506.10967. The kept set is the greedy most likely one of a
    determinantal point process with kernel diag(q) · S · diag(q): S holds the cosines of the tokens
    with each other, q their relevance to the prompt, scaled to (0, 1] over the item.

    Relevance is the cosine with the mean of the prompt's embeddings, so that no text tower is
    needed. That is ours: the published code takes it from CLIP and negates it, a quirk of that
    model which embeddings do not have. Here more alike is more relevant.

    ``relevance_weight`` θ replaces q by exp(α · q) with α = θ / (2 (1 − θ)), the paper's trade-off:
    0 is for differences alone. Without it, q itself is used, as in the published code.

    The published code scales relevance over a whole batch and divides by 0 where it is constant;
    here each item is scaled alone, and constant relevance is q = 1. Where more tokens are asked for
    than are linearly independent, it takes roots of negative numbers; here the picks end there, or
    where no token adds more than rounding, and the most relevant of the rest fill the budget
    (lowest index on ties). A blank (zero) vector is never picked and fills last.

    The published code takes a number of tokens and has no share; the default of 0.1 is ours. Each
    pick adds a row to a Cholesky factor of N columns, fp32; there are no more picks than features
    are wide. The loop over picks is sequential by definition. Never synchronises with the host.
    """

    name: ClassVar[str] = "cdpruner"
    working_copies: ClassVar[float] = 3.1
    needs: ClassVar[frozenset[Need]] = frozenset({"text"})
    paper: ClassVar[str] = "arXiv 2506.10967"

    keep_ratio: KeepRatio = 0.1
    relevance_weight: float | None = Field(
        None,
        ge=0,
        le=0.95,
        description="weight of relevance against diversity, 0 for diversity alone; "
        "null: the published kernel, weighted by relevance as it is",
    )

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        warn_of_pairs(self, tokens)
        n = tokens.num_tokens
        cosines = Cosines(tokens.features, _hold(n, count))
        quality = relevance(cosines.units, tokens.needed("text"))
        picks, gains = greedy_map(cosines, self._weight(quality), count)
        # An index may occur twice, but only among picks without gain.
        gain = torch.zeros_like(quality).index_add(0, picks, (gains > 0).to(quality.dtype))
        rest = torch.where(cosines.blank, -1, quality)
        return FusionPlan.from_survivors(top(torch.where(gain > 0, 2, rest), count), n)

    def matching_flops(self, grid: Grid, width: int) -> int:
        n = prod(grid)
        count = budget(self.keep_ratio, n)
        picks = min(count, width)
        pairs = n * (n - 1) // 2 if _hold(n, count) else picks * n
        # And relevance, and each pick's row of the factor.
        return (pairs + n) * width + picks * (picks - 1) // 2 * n

    def _weight(self, quality: Tensor) -> Tensor:
        """The diagonal of the kernel, up to a factor, which changes no pick."""
        if self.relevance_weight is None:
            return quality**2
        twice_alpha = self.relevance_weight / (1 - self.relevance_weight)
        return torch.exp(twice_alpha * (quality - 1))


def _hold(n: int, count: int) -> bool:
    return n * n <= CHUNK and count * HOLD_FROM > n


def relevance(units: Float[Tensor, "N D"], text: Float[Tensor, "n D"]) -> Float[Tensor, " N"]:
    """Cosine of each token with the mean of ``text``, scaled to (0, 1]; 1 where it is constant."""
    # A sum has the direction of the mean, and is 0 where there is no text.
    prompt, _ = unit(text.sum(0, keepdim=True, dtype=torch.float32))
    similar = to_steps(units @ prompt[0])
    least, most = torch.aminmax(similar)
    return (similar - least + EPSILON) / (most - least + EPSILON)


def greedy_map(
    cosines: Cosines, weight: Float[Tensor, " N"], count: int
) -> tuple[Int[Tensor, " M"], Float[Tensor, " M"]]:
    """Tokens picked one by one, each to raise the determinant of the kernel of the picked most.

    The kernel is the cosines, its rows and columns scaled by the root of ``weight``. Returns up to
    ``count`` picks in order, no more than features are wide, and the factor by which each raises
    the determinant. From the first factor of 0 on, picks mean nothing: nothing independent is left.
    """
    n, rounds = cosines.num_tokens, min(count, cosines.width)
    # Of the kernel without weights: its Cholesky factor, and what that leaves of its diagonal.
    factor = weight.new_empty((rounds, n))
    left = torch.where(cosines.blank, 0.0, torch.ones_like(weight))
    picks = torch.empty(rounds, dtype=torch.long, device=weight.device)
    gains = weight.new_empty(rounds)
    for i in range(rounds):
        new = threshold(to_steps(left), DEPENDENT, 0)
        # Of equals, argmax is the first.
        pick = (weight * new).argmax(0, keepdim=True)
        own = left.index_select(0, pick)
        exists = new.index_select(0, pick) > 0
        before = factor[:i]
        row = cosines.row(pick) - before.T @ before.index_select(1, pick)[:, 0]
        row *= torch.where(exists, own, torch.inf).rsqrt_()
        factor[i] = row
        left = left.addcmul(row, row, value=-1).index_fill_(0, pick, 0)
        picks[i : i + 1] = pick
        gains[i : i + 1] = torch.where(exists, weight.index_select(0, pick) * own, 0)
    return picks, gains
