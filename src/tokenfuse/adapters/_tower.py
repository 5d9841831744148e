"""Vision towers that read fewer patches or frames, from their first block or a later one on.

Nothing in the tower is changed: hooks on its blocks hand them less, and what comes out stands in
its place among as many features as the model expects.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenfuse.adapters._hooks import Hook
from tokenfuse.costs import Stopwatch
from tokenfuse.errors import ConfigError, PlanError, UnsupportedModelError
from tokenfuse.ops.precision import outside_autocast
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._layers import WeighedPlan
from tokenfuse.strategies._tower import PixelTokens, TowerCut, TowerTokens, drops_only
from tokenfuse.tokens import Grid


class TowerCosts(NamedTuple):
    """What a tower has read of the items of one call.

    ``tokens``: by item and block. ``flops_before``, ``flops_after``: by item, multiply-adds of all
    blocks. ``choose_ms``: what choosing took.
    """

    tokens: list[list[int]]
    flops_before: list[int]
    flops_after: list[int]
    choose_ms: float

    def of(self, items: Sequence[int]) -> TowerCosts:
        """The same of some of the items."""
        before, after = ([x[i] for i in items] for x in (self.flops_before, self.flops_after))
        return TowerCosts([self.tokens[i] for i in items], before, after, self.choose_ms)


class TowerStage(ABC):
    """What a strategy does before and inside the tower, in one call of it.

    ``grids``: of the items. ``plans``: what has become of each so far. ``patches_each``: how many
    patches each of what the plans are for has.
    """

    patches_each: int

    def __init__(
        self,
        tower: nn.Module,
        blocks: Sequence[nn.Module],
        grids: Sequence[Grid],
        strategy: Strategy,
        device: torch.device,
    ) -> None:
        self.tower, self.blocks, self.grids, self.strategy = tower, blocks, grids, strategy
        self.cuts = {cut.block: cut for cut in tower_cuts(strategy, len(blocks))}
        self.plans = [FusionPlan.identity(prod(grid), device) for grid in grids]
        self.watch = Stopwatch(device)
        self._thread = threading.get_ident()
        self._counts: list[list[int]] = []
        self._squares: list[Tensor] = []
        self._tokens_each = [1] * len(grids)
        """Visual tokens of each of what the plans are for, by item."""

    def before(self, pixels: Sequence[PixelTokens]) -> None:
        """Ask for the plans before the tower, and hold them against what they have to be."""
        name = self.strategy.name
        self.watch.lap()
        for i, item in enumerate(pixels):
            with outside_autocast(item.pixels.device):
                found = self.strategy.tower_plan(item)
            if found is not None:
                check_plan(found, item.num_tokens, name)
                self.plans[i] = drops_only(found, name)
        self.watch.lap()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the tower run under its hooks inside the block. Other threads are left alone.

        Raises UnsupportedModelError where it ran without them.
        """
        repeated = any(getattr(m, "gradient_checkpointing", False) for m in self.tower.modules())
        if self.tower.training and repeated:
            raise UnsupportedModelError(
                f"strategy {self.strategy.name} acts inside the vision tower in the forward pass "
                "only, and gradient checkpointing repeats it in the backward pass: switch that "
                "off, or act behind the tower"
            )
        with ExitStack() as hooks:
            self._place(hooks)
            yield
        if len(self._counts) != len(self.blocks) or not self._all_ran():
            raise self._compiled()

    def costs(self) -> TowerCosts:
        """What it has cost. One host synchronisation."""
        weights = [
            sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in self.blocks
        ]
        # (2, items): before and after, all blocks together.
        squares = torch.stack(self._squares).sum(0).tolist()
        whole = [[plan.num_source for plan in self.plans]] * len(self.blocks)
        before, after = (
            [
                sum(w * n * self.patches_each for w, n in zip(weights, counts, strict=True))
                + 2 * self._width * square
                for counts, square in zip(zip(*read, strict=True), own, strict=True)
            ]
            for read, own in zip((whole, self._counts), squares, strict=True)
        )
        by_item = [
            [count * each for count in counts]
            for counts, each in zip(zip(*self._counts, strict=True), self._tokens_each, strict=True)
        ]
        return TowerCosts(by_item, before, after, sum(self.watch.read()[1::2]))

    def _compiled(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the hooks of strategy {self.strategy.name} inside a {type(self.tower).__name__} did "
            "not run; expected a tower of which no part was compiled before: call "
            "torch.compiler.reset(), or act behind the tower"
        )

    @abstractmethod
    def _all_ran(self) -> bool:
        """Whether what stands behind blocks has run as often as they have."""

    def finish(self, grids: Sequence[Grid]) -> list[FusionPlan]:
        """The plan of each item for all of its tokens, whose ``grids`` are known by now."""
        return self.plans

    @property
    @abstractmethod
    def _width(self) -> int:
        """Of the queries and keys of all heads together."""

    @abstractmethod
    def _place(self, hooks: ExitStack) -> None:
        """Register the hooks; ``hooks`` removes them."""

    @abstractmethod
    def spread(self, values: Tensor, block: int) -> Tensor:
        """What one block has made of its tokens, for all tokens, in the tower's order."""

    def _here(self) -> bool:
        return threading.get_ident() == self._thread

    def _note(self, number: int, squares: Tensor) -> None:
        """A block is about to run.

        ``squares (2, items)``: the squares of the lengths of its sequences, for all, and for what
        is left.
        """
        if number != len(self._counts):
            raise UnsupportedModelError(
                f"block {number} of a {type(self.tower).__name__} ran after "
                f"{len(self._counts)} blocks; expected each once, in order: strategy "
                f"{self.strategy.name} cannot act inside this tower"
            )
        self._counts.append([plan.num_kept for plan in self.plans])
        self._squares.append(squares)

    def _before(self, number: int, block: nn.Module) -> RemovableHandle:
        """Hook the input of a block."""

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return self._enter(number, args, kwargs) if self._here() else None

        return block.register_forward_pre_hook(Hook(enter, with_kwargs=True), with_kwargs=True)

    @abstractmethod
    def _enter(self, number: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a block: cut, and give it what is left."""

    def _plan_frames(
        self, cut: TowerCut, item: int, states: Tensor, frames: Tensor, sizes: Tensor
    ) -> FusionPlan | None:
        """The plan for the frames of one item; None for all.

        ``states (T, P, D)``: those of the ``frames (T,)`` that are left.
        """
        count = self.grids[item][0]
        if count == 1:
            return None
        coords = frames[:, None] * frames.new_tensor([1, 0, 0])
        view = TowerTokens(
            states, coords, sizes, (count, 1, 1), cut.block, len(self.blocks), frames=True
        )
        return self._ask(cut, view)

    def _ask(self, cut: TowerCut, tokens: TowerTokens) -> FusionPlan | None:
        """The plan of a cut, held against what it has to be; None for all."""
        with outside_autocast(tokens.states.device):
            plan = cut.plan(tokens)
        if plan is None:
            return None
        check_plan(plan, tokens.num_tokens, self.strategy.name)
        return None if plan.num_kept == plan.num_source else plan


def tower_cuts(strategy: Strategy, blocks: int) -> tuple[TowerCut, ...]:
    """The cuts of a strategy in a tower of so many blocks. Raises ConfigError for others."""
    cuts = strategy.tower_cuts(blocks)
    at = [cut.block for cut in cuts]
    if at != sorted(set(at)):
        raise ConfigError(
            f"strategy {strategy.name} acts at vision blocks {at}, in this order; expected each "
            "block once, rising"
        )
    for cut in cuts:
        if not 0 <= cut.block < blocks:
            raise ConfigError(
                f"strategy {strategy.name} acts at vision block {cut.block}; expected 0 to "
                f"{blocks - 1}: the tower has {blocks}"
            )
        if cut.keys and not cut.block:
            raise ConfigError(
                f"strategy {strategy.name} reads keys at vision block 0, and no block is before "
                "it; expected block 1 or a later one"
            )
        if cut.frames and (cut.keys or cut.proportional):
            raise ConfigError(
                f"strategy {strategy.name} asks for keys or proportional attention at a cut of "
                "whole frames; expected a cut of tokens, or neither"
            )
    return cuts


def joined(plans: Sequence[FusionPlan]) -> FusionPlan:
    """The plans of several items as one, for all of their tokens one after the other."""
    survivors, target, begin, slots = [], [], 0, 0
    for plan in plans:
        survivors.append(plan.survivors + begin)
        target.append(torch.where(plan.target < 0, plan.target, plan.target + slots))
        begin, slots = begin + plan.num_source, slots + plan.num_kept
    return FusionPlan(torch.cat(survivors), torch.cat(target))


def of_frames(plan: FusionPlan, place: int) -> FusionPlan:
    """A plan for frames as one for their tokens, ``place`` of each."""
    offsets = torch.arange(place, device=plan.target.device)
    survivors = (plan.survivors[:, None] * place + offsets).flatten()
    target = plan.target[:, None] * place + offsets
    target = torch.where(plan.target[:, None] < 0, plan.target[:, None], target).flatten()
    if isinstance(plan, WeighedPlan):
        return WeighedPlan(survivors, target, plan.weight.repeat_interleave(place))
    return FusionPlan(survivors, target)


def check_plan(plan: FusionPlan, n: int, name: str) -> None:
    """Raise PlanError, which names the strategy, for what is no plan for ``n`` tokens."""
    if not isinstance(plan, FusionPlan):
        raise PlanError(
            f"strategy {name} returned a {type(plan).__name__} as its plan; expected a FusionPlan"
        )
    try:
        plan.check(n)
    except PlanError as error:
        raise PlanError(f"strategy {name}: {error}") from error
