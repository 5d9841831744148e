"""Evenly spaced tokens, whatever they show."""

from __future__ import annotations

from typing import ClassVar

from tokenfuse.ops.select import spread
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.tokens import VisualTokens


class Uniform(Budgeted):
    """Keep tokens at even distances in sequence order and drop the rest.

    A control: a method that looks at the tokens should do better. Survivors are the middles of
    equal parts of the sequence. Where a row of the grid is a whole number of distances long, the
    same columns survive in every row. Never synchronises with the host.
    """

    name: ClassVar[str] = "uniform"

    keep_ratio: KeepRatio = 0.5

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        n = tokens.num_tokens
        return FusionPlan.from_survivors(spread(count, n, tokens.features.device), n)
