"""Token Merging."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tokenfuse.errors import ConfigError
from tokenfuse.ops.matching import bipartite_soft_matching, most_pairs, weighted_mean
from tokenfuse.ops.select import budget
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted
from tokenfuse.strategies._vit import VitStrategy
from tokenfuse.tokens import Grid, VisualTokens

Merges = Annotated[int, Field(ge=0, strict=True)]


class ToMe(Budgeted, VitStrategy):
    """Fuse every second token that resembles another most, round by round.

    Source: Token Merging, arXiv 2210.09461. A round of bipartite soft matching compares the tokens
    at even places with those at odd places, and merges the even ones with the greatest cosine into
    their best match, as the mean weighted by how many tokens each stands for.

    Inside a vision transformer (``attach``) this is the published method: one round per block,
    between attention and MLP, on the block's keys averaged over heads. ``r`` is its native
    parameter. Class, distillation and register tokens stay alone. Where ``r`` is not given, the
    blocks merge evenly until ⌈keep_ratio · N⌉ of the ``N`` other tokens are left, or as near as
    halving them in every block gets.

    Before an LLM, ``keep_ratio`` decides, and ``r``, which counts per block, is refused: rounds on
    the features merge half of the tokens each, until the last merges just as many as leave exactly
    ⌈keep_ratio · N⌉. This use is ours.

    Unlike the published code: register tokens are protected, a zero key merges last instead of
    first, ties go to the lowest index, survivors keep sequence order, and attention in training is
    proportional too. The schedule is truncated to whole numbers per block as there, so that
    ``r = 16, inflection = -1`` removes 187 tokens over 12 blocks, not 192.

    Never synchronises with the host.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "arXiv 2210.09461"

    keep_ratio: float = Field(
        0.5, gt=0, le=1, description="share of tokens to keep, exactly; in a ViT where r is null"
    )
    r: Merges | list[Merges] | None = Field(
        None,
        description="tokens merged in each block of a vision transformer, or a list with a number "
        "per block (0 for blocks that it does not reach); refused before an LLM",
    )
    inflection: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="slope of r over the blocks: -1 from 2r down to 0, 0 constant, 1 from 0 to 2r",
    )
    proportional: bool = Field(
        True,
        description="in a vision transformer, attention weighs a token by the tokens it stands for",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ToMe:
        if self.inflection and not isinstance(self.r, int):
            raise ValueError(
                f"inflection: {self.inflection} bends a constant r, and r is {self.r}; give r as "
                "one whole number, or leave inflection out"
            )
        return self

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        if self.r is not None:
            raise ConfigError(
                f"tome: r: {self.r} counts tokens per block of a vision transformer, and there are "
                "no blocks before an LLM; expected r: null, and keep_ratio for how many stay"
            )
        x = tokens.features.to(torch.float32)
        plan = FusionPlan.identity(len(x), x.device)
        while plan.num_kept > count:
            step = bipartite_soft_matching(x, plan.num_kept - count)
            x = weighted_mean(step, x, plan.sizes)
            plan = plan.compose(step)
        return plan

    def matching_flops(self, grid: Grid, width: int) -> int:
        n = grid[0] * grid[1] * grid[2]
        count, total = budget(self.keep_ratio, n), 0
        while n > count:
            total += n // 2 * ((n + 1) // 2) * width
            n -= min(n - count, most_pairs(n))
        return total

    def merges(self, blocks: int, tokens: int) -> list[int]:
        if isinstance(self.r, list):
            return (self.r + [0] * blocks)[:blocks]
        if self.r is not None:
            first = int(self.r * (1 - self.inflection))
            rise = 2 * (self.r - first) / max(1, blocks - 1)
            return [int(first + rise * block) for block in range(blocks)]
        removed = tokens - budget(self.keep_ratio, tokens)
        marks = [removed * block // blocks for block in range(blocks + 1)]
        return [after - before for before, after in pairwise(marks)]

    def match(self, keys: Tensor, r: int, protected: int) -> FusionPlan:
        return bipartite_soft_matching(keys, r, protected)

    def key_bias(self, sizes: Tensor) -> Tensor | None:
        return sizes.log() if self.proportional else None
