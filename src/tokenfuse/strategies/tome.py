"""Token Merging."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tokenfuse.errors import ConfigError
from tokenfuse.ops.matching import bipartite_soft_matching, most_pairs, weighted_mean
from tokenfuse.ops.select import budget
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Strategy, warn_of_pairs
from tokenfuse.strategies._fields import as_tuple
from tokenfuse.strategies._tower import TowerCut, TowerTokens
from tokenfuse.strategies._vit import VitStrategy
from tokenfuse.tokens import Grid, Modality, VisualTokens

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

    Inside the vision tower of a VLM (``tower: true``) the rounds stand between blocks, each frame
    by itself, and compare the keys of the block before, ahead of any rotation, patch by patch of
    each visual token; survivors keep their rotary positions, and the prompt loses what was merged.

    Before an LLM, ``keep_ratio`` decides, and ``r``, which counts per block, is refused: rounds on
    the features merge half of the tokens each, until the last merges just as many as leave exactly
    ⌈keep_ratio · N⌉. This use is ours.

    Unlike the published code: register tokens are protected, a zero key merges last instead of
    first, ties go to the lowest index, survivors keep sequence order, and attention in training is
    proportional too. The schedule is truncated to whole numbers per block as there, so that
    ``r = 16, inflection = -1`` removes 187 tokens over 12 blocks, not 192.

    Never synchronises with the host; what applies it inside a VLM's tower does.
    """

    name: ClassVar[str] = "tome"
    working_copies: ClassVar[float] = 3.1
    paper: ClassVar[str] = "arXiv 2210.09461"

    keep_ratio: float = Field(
        0.5, gt=0, le=1, description="share of tokens to keep, exactly; in a ViT where r is null"
    )
    r: Merges | tuple[Merges, ...] | None = Field(
        None,
        description="tokens merged in each block of a vision transformer, or a list with a number "
        "per block (0 for blocks that it does not reach), in a VLM's tower after each block but "
        "the last; refused before an LLM",
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
    tower: bool = Field(
        False,
        description="merge between the blocks of a VLM's vision tower instead of before the LLM",
    )

    @field_validator("r", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return as_tuple(value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _consistent(self) -> ToMe:
        if self.inflection and not isinstance(self.r, int):
            raise ValueError(
                f"inflection: {self.inflection} bends a constant r, and r is {self.r}; give r as "
                "one whole number, or leave inflection out"
            )
        return self

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        if self.tower:
            raise ConfigError(
                "tome: tower: true merges inside a vision tower; expected compress or attach on a "
                "model, or no tower: bare tokens have none"
            )
        if self.r is not None:
            raise ConfigError(
                f"tome: r: {self.r} counts tokens per block of a vision transformer, and there are "
                "no blocks before an LLM; expected r: null, and keep_ratio for how many stay"
            )
        warn_of_pairs(self, tokens)
        x = tokens.features.to(torch.float32)
        plan = FusionPlan.identity(len(x), x.device)
        while plan.num_kept > count:
            step = bipartite_soft_matching(x, plan.num_kept - count)
            x = weighted_mean(step, x, plan.sizes)
            plan = plan.compose(step)
        return plan

    def at_share(self, share: float, layers: int) -> Self:
        """As ever, by ``keep_ratio`` alone."""
        return self.with_options(keep_ratio=share, r=None, inflection=0.0)

    def matching_flops(self, grid: Grid, width: int) -> int:
        if self.tower:
            return 0
        n = grid[0] * grid[1] * grid[2]
        count, total = budget(self.keep_ratio, n), 0
        while n > count:
            total += n // 2 * ((n + 1) // 2) * width
            n -= min(n - count, most_pairs(n))
        return total

    @property
    def needs_grid(self) -> bool:
        return self.tower

    def num_kept(self, grid: Grid) -> int | None:
        # How many the blocks can merge depends on the tower.
        return None if self.tower else super().num_kept(grid)

    def for_modality(self, modality: Modality) -> Strategy | None:
        return None if self.tower else self

    @property
    def acts_in_tower(self) -> bool:
        return self.tower

    def tower_cuts(self, blocks: int) -> tuple[TowerCut, ...]:
        if not self.tower:
            return ()
        if isinstance(self.r, tuple) and any(self.r[blocks - 1 :]):
            raise ConfigError(
                f"tome: r: {list(self.r)} merges after block {len(self.r) - 1}, and between the "
                f"blocks of this tower there are {blocks - 1} places; expected so many numbers, or "
                "zeros behind them"
            )
        # How many of a share go depends on the item.
        fixed = [1] * blocks if self.r is None else self.merges(blocks - 1, 0)
        return tuple(
            TowerCut(block, self._merge, keys=True, proportional=self.proportional)
            for block in range(1, blocks)
            if fixed[block - 1]
        )

    @torch.no_grad()
    def _merge(self, tokens: TowerTokens) -> FusionPlan | None:
        """The merges between two blocks of a VLM's tower, in each frame."""
        assert tokens.keys is not None
        frames, n = tokens.grid[0], tokens.num_tokens
        r = self.merges(tokens.num_blocks - 1, prod(tokens.grid[1:]))[tokens.block - 1]
        if r == 0:
            return None
        # Frames keep equally many, since all of them began whole.
        metric = tokens.keys.flatten(1).view(frames, n // frames, -1)
        return bipartite_soft_matching(metric, r)

    def merges(self, blocks: int, tokens: int) -> list[int]:
        if isinstance(self.r, tuple):
            return [*self.r, *[0] * blocks][:blocks]
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
