"""The conformance kit for strategies that act before or inside the vision tower."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._tower import PixelTokens, TowerTokens, merged
from tokenfuse.tokens import Grid, grid_coords

WIDTH, PATCHES, KEYS = 16, 4, 8
BLOCKS = (3, 12, 27, 32)
"""Depths of towers."""


def pixel_tokens_of(grid: Grid, *, kind: str = "random", seed: int = 0) -> PixelTokens:
    """One item before the tower. ``kind``: ``random``, or ``alike`` for equal patches."""
    rng = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2]
    levels = torch.randint(0, 256, (n, 3, 8), generator=rng).float()
    if kind == "alike":
        levels[:] = levels[0]
    return PixelTokens((levels / 255 - 0.5) / 0.5, grid, torch.full((3,), 0.5))


def tower_tokens_of(
    grid: Grid,
    block: int = 1,
    num_blocks: int = 12,
    *,
    frames: bool = False,
    kind: str = "random",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TowerTokens:
    """One item at a vision block, with all that a cut may read.

    ``frames``: as a cut of whole frames sees it. ``kind``: ``random``, ``alike`` or ``zeros``.
    Equal arguments make equal tokens.
    """
    rng = torch.Generator().manual_seed(seed)
    t, h, w = grid
    shape = (t, h * w * PATCHES) if frames else (t * h * w, PATCHES)
    states = torch.randn(*shape, WIDTH, generator=rng)
    if kind == "alike":
        states[:] = states[0].clone()
    if kind == "zeros":
        states[:] = 0
    seen = (t, 1, 1) if frames else grid
    coords = grid_coords(seen)
    return TowerTokens(
        states.to(dtype),
        coords,
        torch.ones(len(coords), dtype=torch.long),
        seen,
        block,
        num_blocks,
        frames,
        None if frames else torch.randn(*shape, KEYS, generator=rng).to(dtype),
    )


class TowerStrategyConformance:
    """What every cut before or inside the vision tower promises, as tests.

    A subclass gives a strategy::

        class TestMine(TowerStrategyConformance):
            def make(self, **options):
                return Mine(**options)
    """

    ratio: ClassVar[dict[str, Any] | None] = None
    """Options with which the strategy keeps everything, None where it has none."""

    def make(self, **options: Any) -> Strategy:
        """The strategy with some options."""
        raise NotImplementedError("the test class has no make(**options)")

    def test_cuts_rise_from_block_to_block(self) -> None:
        """Each block of any tower once, and the same ones whenever asked."""
        strategy = self.make()
        assert strategy.acts_before_tower or strategy.acts_in_tower
        for blocks in BLOCKS:
            at = [cut.block for cut in strategy.tower_cuts(blocks)]
            assert at == sorted(set(at))
            assert all(0 <= block < blocks for block in at)
            assert at == [cut.block for cut in strategy.tower_cuts(blocks)]
            assert strategy.acts_before_tower or at

    # Classes share the kit, each with tests of its own.
    @settings(max_examples=25, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        st.sampled_from([(1, 3, 4), (2, 2, 2), (9, 2, 3)]),
        st.sampled_from(["random", "alike", "zeros"]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.integers(0, 9),
    )
    def test_every_plan_in_the_tower_is_valid_and_the_same_again(
        self, grid: Grid, kind: str, dtype: torch.dtype, seed: int
    ) -> None:
        """Some token stays, what is merged is finite, and nothing that was given has changed."""
        for cut in self.make().tower_cuts(12):
            if cut.frames and grid[0] == 1:
                continue
            tokens = tower_tokens_of(
                grid, cut.block, frames=cut.frames, kind=kind, seed=seed, dtype=dtype
            )
            before = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
            copies = {k: v.clone() for k, v in before.items() if isinstance(v, Tensor)}
            plan, again = cut.plan(tokens), cut.plan(tokens)
            assert (plan is None) == (again is None)
            if plan is None or again is None:
                continue
            plan.check(tokens.num_tokens)
            assert torch.equal(plan.survivors, again.survivors)
            assert torch.equal(plan.target, again.target)
            made = merged(plan, tokens.states, tokens.sizes)
            assert made.shape == (plan.num_kept, *tokens.states.shape[1:])
            assert made.dtype == dtype
            assert bool(made.isfinite().all())
            alone = plan.sizes == 1
            assert torch.equal(made[alone], tokens.states[plan.survivors][alone])
            assert all(torch.equal(before[name], copies[name]) for name in copies)

    def test_plans_before_the_tower_drop_and_nothing_else(self) -> None:
        """Some token stays, none is fused, and the pixels are as they were."""
        strategy = self.make()
        if not strategy.acts_before_tower:
            return
        for grid in ((1, 3, 4), (4, 2, 3)):
            for kind in ("random", "alike"):
                pixels = pixel_tokens_of(grid, kind=kind)
                before = pixels.pixels.clone()
                plan = strategy.tower_plan(pixels)
                if plan is None:
                    continue
                plan.check(pixels.num_tokens)
                assert int(plan.sizes.max()) == 1
                assert torch.equal(pixels.pixels, before)

    def test_keeping_everything_is_the_identity(self) -> None:
        """Whatever the tokens show, with the options that say so."""
        if self.ratio is None:
            return
        strategy = self.make(**self.ratio)
        for grid in ((1, 3, 4), (9, 2, 3)):
            plans: list[FusionPlan | None] = [
                cut.plan(tower_tokens_of(grid, cut.block, frames=cut.frames, kind="alike"))
                for cut in strategy.tower_cuts(12)
                if not (cut.frames and grid[0] == 1)
            ]
            if strategy.acts_before_tower:
                plans.append(strategy.tower_plan(pixel_tokens_of(grid, kind="alike")))
            assert all(plan is None or plan.is_identity for plan in plans)
