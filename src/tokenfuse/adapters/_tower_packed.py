"""Vision towers of Qwen's kind, which read the patches of all items in a row: tokens can go."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tokenfuse.adapters._hooks import Hook
from tokenfuse.adapters._sized import SizedAttention
from tokenfuse.adapters._tower import TowerStage, joined, of_frames
from tokenfuse.errors import PlanError
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._tower import TowerCut, TowerTokens, merged
from tokenfuse.tokens import grid_coords


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
