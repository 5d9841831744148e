"""Tokens drawn by lot."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tokenfuse.strategies._base import Scored
from tokenfuse.strategies._fields import Seed
from tokenfuse.tokens import VisualTokens


class Random(Scored):
    """Keep tokens drawn at random without replacement and drop the rest.

    A control that is hard to beat at small budgets. The draw depends on ``seed`` and the number of
    tokens alone, so that every item of a size loses the same places, on every device. Never
    synchronises with the host.
    """

    name: ClassVar[str] = "random"

    seed: Seed = 0

    def score(self, tokens: VisualTokens) -> Float[Tensor, " N"]:
        # Drawn on the host, whose generator is the same everywhere.
        lots = torch.rand(tokens.num_tokens, generator=torch.Generator().manual_seed(self.seed))
        return lots.to(tokens.features.device, non_blocking=True)
