"""Evenly spaced tokens, whatever they show."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokenfuse.ops.select import spread
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._anywhere import Anywhere
from tokenfuse.strategies._fields import KeepRatio


class Uniform(Anywhere):
    """Keep tokens at even distances in sequence order and drop the rest.

    A control: a method that looks at the tokens should do better. Survivors are the middles of
    equal parts of the sequence. Where a row of the grid is a whole number of distances long, the
    same columns survive in every row. With ``layer`` all visual tokens of a prompt are one
    sequence, thinned out at the input of that decoder layer; with ``vision_block`` each item is,
    at the input of that block of the vision tower. Never synchronises with the host;
    what applies it inside the tower or the LLM does.
    """

    name: ClassVar[str] = "uniform"

    keep_ratio: KeepRatio = 0.5

    def pick(self, n: int, count: int, device: torch.device) -> FusionPlan:
        return FusionPlan.from_survivors(spread(count, n, device), n)
