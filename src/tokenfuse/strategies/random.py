"""Tokens drawn by lot."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokenfuse.ops.select import top
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted
from tokenfuse.strategies._fields import KeepRatio, Seed
from tokenfuse.tokens import VisualTokens


class Random(Budgeted):
    """Keep tokens drawn at random without replacement and drop the rest.

    A control that is hard to beat at small budgets. The draw depends on ``seed`` and the number of
    tokens alone, so that every item of a size loses the same places, on every device. Never
    synchronises with the host.
    """

    name: ClassVar[str] = "random"

    keep_ratio: KeepRatio = 0.5
    seed: Seed = 0

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        n = tokens.num_tokens
        # Drawn on the host, whose generator is the same everywhere.
        lots = torch.rand(n, generator=torch.Generator().manual_seed(self.seed))
        survivors = top(lots, count).to(tokens.features.device, non_blocking=True)
        return FusionPlan.from_survivors(survivors, n)
