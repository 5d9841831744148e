"""Tokens drawn by lot."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokenfuse.ops.select import top
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._anywhere import Anywhere
from tokenfuse.strategies._fields import KeepRatio, Seed


class Random(Anywhere):
    """Keep tokens drawn at random without replacement and drop the rest.

    A control that is hard to beat at small budgets. The draw depends on ``seed`` and the number of
    tokens alone, so that every item of a size loses the same places, on every device. With
    ``layer`` the draw is among all visual tokens of a prompt, at the input of that decoder layer;
    with ``vision_block`` among those of each item, at the input of that block of the vision tower.
    Never synchronises with the host; what applies it inside the tower or the LLM does.
    """

    name: ClassVar[str] = "random"

    keep_ratio: KeepRatio = 0.5
    seed: Seed = 0

    def pick(self, n: int, count: int, device: torch.device) -> FusionPlan:
        # Drawn on the host, whose generator is the same everywhere.
        lots = torch.rand(n, generator=torch.Generator().manual_seed(self.seed))
        return FusionPlan.from_survivors(top(lots.to(device, non_blocking=True), count), n)
