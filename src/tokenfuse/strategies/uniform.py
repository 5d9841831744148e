"""Evenly spaced tokens, whatever they show."""

from __future__ import annotations

from typing import ClassVar

import torch

from tokenfuse.ops.select import spread
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._fields import KeepRatio
from tokenfuse.strategies._inside import PerhapsInside
from tokenfuse.strategies._layers import LayerTokens
from tokenfuse.tokens import VisualTokens


class Uniform(PerhapsInside):
    """Keep tokens at even distances in sequence order and drop the rest.

    A control: a method that looks at the tokens should do better. Survivors are the middles of
    equal parts of the sequence. Where a row of the grid is a whole number of distances long, the
    same columns survive in every row. With ``layer`` all visual tokens of a prompt are one
    sequence, thinned out at the input of that decoder layer. Never synchronises with the host.
    """

    name: ClassVar[str] = "uniform"

    keep_ratio: KeepRatio = 0.5

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        return _spread(count, tokens.num_tokens, tokens.features.device)

    def choose_inside(self, tokens: LayerTokens, count: int) -> FusionPlan:
        return _spread(count, tokens.num_visual, tokens.visual.device)


def _spread(count: int, n: int, device: torch.device) -> FusionPlan:
    return FusionPlan.from_survivors(spread(count, n, device), n)
