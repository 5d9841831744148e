"""Tokens drawn by lot."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from tokenfuse.ops.select import top
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted
from tokenfuse.tokens import VisualTokens


class Random(Budgeted):
    """Keep tokens drawn at random without replacement and drop the rest.

    A control that is hard to beat at small budgets. The draw depends on ``seed`` and the number of
    tokens alone, so that every item of a size loses the same places, on every device. Never
    synchronises with the host.
    """

    name: ClassVar[str] = "random"

    keep_ratio: float = Field(0.5, gt=0, le=1, description="share of tokens to keep, exactly")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the draw")

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        n = tokens.num_tokens
        # Drawn on the host, whose generator is the same everywhere.
        lots = torch.rand(n, generator=torch.Generator().manual_seed(self.seed))
        survivors = top(lots, count).to(tokens.features.device, non_blocking=True)
        return FusionPlan.from_survivors(survivors, n)
