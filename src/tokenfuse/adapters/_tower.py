"""Vision towers that read fewer patches or frames, from their first block or a later one on.

Nothing in the tower is changed: hooks on its blocks hand them less, and what comes out stands in
its place among as many features as the model expects.
"""

from __future__ import annotations

import sys
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
from tokenfuse.adapters._sized import SizedAttention
from tokenfuse.costs import Stopwatch
from tokenfuse.errors import ConfigError, PlanError, UnsupportedModelError
from tokenfuse.ops.precision import outside_autocast
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._layers import WeighedPlan
from tokenfuse.strategies._tower import PixelTokens, TowerCut, TowerTokens, drops_only, merged
from tokenfuse.tokens import Grid, grid_coords


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
                _check(found, item.num_tokens, name)
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
        _check(plan, tokens.num_tokens, self.strategy.name)
        return None if plan.num_kept == plan.num_source else plan


class PackedStage(TowerStage):
    """In a tower of Qwen's kind, whose blocks take any number of patches of all items in a row.

    ``grid (items, 3)``: as the tower gets it.
    """

    def __init__(self, tower: Any, grid: Tensor, strategy: Strategy) -> None:
        merge: int = tower.spatial_merge_size
        self.group = self.patches_each = merge**2
        grids = [(t, h // merge, w // merge) for t, h, w in grid.tolist()]
        super().__init__(tower, list(tower.blocks), grids, strategy, grid.device)
        total = sum(map(prod, grids))
        self.order = torch.arange(total, device=grid.device)
        if hasattr(tower, "fullatt_block_indexes"):
            # Windows follow each other in the tower.
            find = sys.modules[type(tower).__module__].get_vision_window_index
            order = find(grid, merge, tower.window_size, tower.patch_size)[0]
            self.order = order.to(grid.device)
        self.keys: Tensor | None = None
        self.sized: SizedAttention | None = None
        self._merged = self._due = 0
        self._in_part = [False] * len(grids)
        """Of each item, whether tokens have gone that are no whole frame."""
        self._made: dict[int, tuple[Any, Any]] = {}
        self._states: list[tuple[Tensor, Tensor]] = []
        """By block: which places of the tower's order it reads, and where all are among those."""

    @property
    def _width(self) -> int:
        attention: Any = self.blocks[0].attn
        return int(attention.qkv.weight.shape[0]) // 3

    def _place(self, hooks: ExitStack) -> None:
        self._in_part = [not plan.is_identity for plan in self.plans]
        self._arrange()
        if any(cut.proportional for cut in self.cuts.values()):
            self.sized = SizedAttention()
            for block in self.blocks:
                self.sized.place(block.attn, hooks, self._here)
        for number, block in enumerate(self.blocks):
            hooks.enter_context(self._before(number, block))
            if number + 1 in self.cuts and self.cuts[number + 1].keys:
                attention: Any = block.attn
                hooks.enter_context(
                    attention.qkv.register_forward_hook(
                        Hook(
                            lambda module, args, output, heads=attention.num_heads: self._hear(
                                output, heads
                            )
                        )
                    )
                )
        for merger in self._mergers:
            hooks.enter_context(merger.register_forward_hook(Hook(self._whole)))

    @property
    def _mergers(self) -> list[nn.Module]:
        tower: Any = self.tower
        return [tower.merger, *getattr(tower, "deepstack_merger_list", ())]

    def _all_ran(self) -> bool:
        weighed = 0 if self.sized is None else self.sized.calls
        return self._merged == len(self._mergers) and weighed == self._due

    def _hear(self, output: Tensor, heads: int) -> None:
        if self._here():
            self.keys = output.unflatten(-1, (3, heads, -1))[:, 1].mean(1)

    def _arrange(self) -> None:
        """Note which places of the tower's order are left."""
        whole = joined(self.plans)
        survivors, slot_of = whole.survivors, whole.target
        mask = torch.zeros_like(slot_of, dtype=torch.bool).index_fill(0, survivors, True)
        # Of all places in the tower's order: the slot that each belongs to, in the grid's order.
        slot_there = slot_of[self.order]
        self.places = mask[self.order].nonzero().flatten()
        # The slots in the tower's order, and back.
        self.slots = slot_there[self.places]
        self.back = self.slots.argsort()
        moved = self.back[slot_there.clamp_min(0)]
        self.target = torch.where(slot_there < 0, slot_there, moved)
        offsets = torch.arange(self.group, device=self.places.device)
        self.patches = (self.places[:, None] * self.group + offsets).flatten()
        left = torch.zeros_like(mask, dtype=torch.long).index_fill(0, self.places, 1)
        self.ends = torch.cat([left.new_zeros(1), left.cumsum(0) * self.group])
        self._made.clear()

    def _enter(self, number: int, args: Any, kwargs: dict[str, Any]) -> Any:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        if number == 0 and states.shape[0] != len(self.patches):
            states = states[self.patches]
        if number in self.cuts:
            states = self._cut(self.cuts[number], states)
        changed = {name: self._short(name, value) for name, value in kwargs.items()}
        squares = (
            self._squared(kwargs["cu_seqlens"], [plan.num_source for plan in self.plans]),
            self._squared(changed["cu_seqlens"], [plan.num_kept for plan in self.plans]),
        )
        self._note(number, torch.stack(squares))
        self._states.append((self.places, self.target))
        self._due += self.sized is not None and self.sized.sizes is not None
        if args:
            return (states, *args[1:]), changed
        return args, {**changed, "hidden_states": states}

    def _squared(self, ends: Tensor, tokens: Sequence[int]) -> Tensor:
        """The squares of the lengths of sequences that end there, summed by item."""
        lasts = torch.tensor(tokens, device=ends.device).cumsum(0) * self.group
        item = torch.bucketize(ends[1:], lasts)
        return torch.zeros_like(lasts).index_add(0, item, ends.diff().long().square())

    def _short(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor | tuple) and name != "max_seqlen":
            return value
        if len(self.patches) == len(self.order) * self.group:
            return value
        # All blocks of a kind get the same tensors.
        if id(value) not in self._made:
            self._made[id(value)] = (value, self._cut_argument(name, value))
        return self._made[id(value)][1]

    def _cut_argument(self, name: str, value: Any) -> Any:
        if name == "cu_seqlens":
            ends = self.ends[value.long() // self.group].to(value.dtype)
            # A frame, or a window, of which nothing is left is none.
            return torch.unique_consecutive(ends)
        if name == "max_seqlen":
            return None
        if isinstance(value, tuple):
            return tuple(x[self.patches] for x in value)
        return value

    def _cut(self, cut: TowerCut, states: Tensor) -> Tensor:
        """What is left of the states at a cut, in the tower's order."""
        self.watch.lap()
        rows = states.unflatten(0, (-1, self.group))[self.back]
        keys = None if self.keys is None else self.keys.unflatten(0, (-1, self.group))[self.back]
        if cut.keys and keys is None:
            raise self._compiled()
        self.keys = None
        counts = [plan.num_kept for plan in self.plans]
        parts: list[Tensor] = []
        changed = False
        for i, part in enumerate(rows.split(counts)):
            own = None if keys is None else keys.split(counts)[i]
            plan = self._plan(cut, i, part, own)
            if plan is None:
                parts.append(part)
                continue
            changed = True
            parts.append(merged(plan, part, self.plans[i].sizes))
            self.plans[i] = self.plans[i].compose(plan)
        if not changed:
            self.watch.lap()
            return states
        self._arrange()
        if self.sized is not None and (cut.proportional or self.sized.sizes is not None):
            sizes = torch.cat([plan.sizes for plan in self.plans])[self.slots]
            self.sized.sizes = sizes.repeat_interleave(self.group)
        self.watch.lap()
        return torch.cat(parts)[self.slots].flatten(0, 1)

    def _plan(
        self, cut: TowerCut, item: int, states: Tensor, keys: Tensor | None
    ) -> FusionPlan | None:
        """The plan of one item for its tokens that are left; None for all."""
        now, grid = self.plans[item], self.grids[item]
        coords = grid_coords(grid, states.device)[now.survivors]
        if not cut.frames:
            size = (cut.block, len(self.blocks))
            plan = self._ask(cut, TowerTokens(states, coords, now.sizes, grid, *size, keys=keys))
            self._in_part[item] |= plan is not None
            return plan
        place = grid[1] * grid[2]
        if grid[0] == 1:
            return None
        if self._in_part[item]:
            raise PlanError(
                f"strategy {self.strategy.name} merges whole frames at vision block {cut.block}, "
                "and tokens went before it; expected nothing before it in the chain"
            )
        whole = states.unflatten(0, (-1, place)).flatten(1, 2)
        plan = self._plan_frames(cut, item, whole, coords[::place, 0], now.sizes[::place])
        return None if plan is None else of_frames(plan, place)

    def _whole(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self._here():
            return None
        self._merged += 1
        if len(self.places) == len(self.order):
            return None
        return FusionPlan(self.places, self.target).expand(output)

    def spread(self, values: Tensor, block: int) -> Tensor:
        return FusionPlan(*self._states[block]).expand(values)


class FrameStage(TowerStage):
    """In a tower that reads frames of one length, ``(frames, P, D)``: whole frames go.

    Between blocks there are as many frames as ever; those that were merged are alike. ``frames``:
    how many each item has. Its plans are for frames.
    """

    def __init__(
        self,
        tower: nn.Module,
        blocks: Sequence[nn.Module],
        frames: Sequence[int],
        strategy: Strategy,
        device: torch.device,
    ) -> None:
        super().__init__(tower, blocks, [(count, 1, 1) for count in frames], strategy, device)
        self.whole = joined(self.plans)
        self._at: list[FusionPlan] = []
        self._left = 0

    @property
    def _width(self) -> int:
        attention: Any = self.blocks[0].self_attn
        return int(attention.q_proj.weight.shape[0])

    def finish(self, grids: Sequence[Grid]) -> list[FusionPlan]:
        self._tokens_each = [h * w for _, h, w in grids]
        pairs = zip(self.plans, self._tokens_each, strict=True)
        return [of_frames(plan, size) for plan, size in pairs]

    def spread(self, values: Tensor, block: int) -> Tensor:
        plan = self._at[block]
        return plan.expand(values.unflatten(0, (plan.num_kept, -1))).flatten(0, 1)

    def _place(self, hooks: ExitStack) -> None:
        for number, block in enumerate(self.blocks):
            hooks.enter_context(self._before(number, block))

            def leave(module: nn.Module, args: Any, output: Any) -> Any:
                return self._leave(output) if self._here() else None

            # Before other hooks, which expect what the block returns.
            hooks.enter_context(block.register_forward_hook(Hook(leave), prepend=True))

    def _enter(self, number: int, args: Any, kwargs: dict[str, Any]) -> Any:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        length = states.shape[1]
        short = self.whole.select(states)
        if number in self.cuts:
            short = self._cut(self.cuts[number], short)
        counts = [[plan.num_source, plan.num_kept] for plan in self.plans]
        self._note(number, torch.tensor(counts).T * length**2)
        self.patches_each = length
        self._at.append(self.whole)
        if args:
            return (short, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": short}

    def _all_ran(self) -> bool:
        return self._left == len(self.blocks)

    def _leave(self, output: Any) -> Any:
        self._left += 1
        if isinstance(output, tuple):
            return (self.whole.expand(output[0]), *output[1:])
        return self.whole.expand(output)

    def _cut(self, cut: TowerCut, states: Tensor) -> Tensor:
        self.watch.lap()
        parts = []
        for i, part in enumerate(states.split([plan.num_kept for plan in self.plans])):
            now = self.plans[i]
            plan = self._plan_frames(cut, i, part, now.survivors, now.sizes)
            if plan is not None:
                part = merged(plan, part, now.sizes)
                self.plans[i] = now.compose(plan)
            parts.append(part)
        self.whole = joined(self.plans)
        self.watch.lap()
        return torch.cat(parts)


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


def _check(plan: FusionPlan, n: int, name: str) -> None:
    if not isinstance(plan, FusionPlan):
        raise PlanError(
            f"strategy {name} returned a {type(plan).__name__} as its plan; expected a FusionPlan"
        )
    try:
        plan.check(n)
    except PlanError as error:
        raise PlanError(f"strategy {name}: {error}") from error
