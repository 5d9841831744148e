"""Vision towers that read frames of one length in a batch: whole frames can go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tokenfuse.adapters._hooks import Hook
from tokenfuse.adapters._tower import TowerStage, joined, of_frames
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._tower import TowerCut, merged
from tokenfuse.tokens import Grid


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
