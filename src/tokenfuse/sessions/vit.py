"""A session of a vision transformer: fewer tokens from block to block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenfuse.adapters._hooks import Hook
from tokenfuse.adapters._vit import VitAdapter
from tokenfuse.config import PROMPT_OPTIONS, Configuration
from tokenfuse.errors import AttachError, ConfigError, UnsupportedModelError
from tokenfuse.ops.matching import weighted_mean
from tokenfuse.plan import FusionPlan
from tokenfuse.registry import Registry
from tokenfuse.sessions._attached import Attached, refuse_compiled
from tokenfuse.strategies._vit import VitStrategy


class _Pass:
    """What one thread's present forward pass is at.

    ``tokens``: of an image, at the entry of each block so far. ``plan``: what has become of the
    ``B * N`` tokens. ``merges``: how many tokens each block removes. ``keys``: of the present
    block. ``merged`` and ``branch``: the residual stream after merging, and what the block's second
    half adds to it.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.plan: FusionPlan | None = None
        self.merges: list[int] = []
        self.keys: Tensor | None = None
        self.merged: Tensor | None = None
        self.branch: Tensor | None = None


class VitSession(Attached):
    """An attached vision transformer.

    ``tokens``: how many tokens of an image entered each block at the last forward pass of this
    thread. ``plan``: what became of the ``B * N`` tokens of its images, which are counted one image
    after the other.

    Every block still returns a row for every token; merged tokens have equal rows. So pooling,
    heads and dense features work as ever, and a mean weighs each token by what it stands for. A
    shallow copy of the model has the same blocks, and so the same merging.
    """

    def __init__(
        self, adapter: VitAdapter, configuration: Configuration, registry: Registry
    ) -> None:
        strategy = configuration.strategy
        if not isinstance(strategy, VitStrategy):
            known = registry.strategies.items()
            fit = (name for name, entry in known if issubclass(entry.cls, VitStrategy))
            raise UnsupportedModelError(
                f"strategy {strategy.name} shortens the prompt of a vision-language model, and "
                f"{type(adapter.model).__name__} has none; expected one that acts inside a vision "
                f"transformer: {', '.join(sorted(fit))}"
            )
        for option in PROMPT_OPTIONS:
            if getattr(configuration, option) != getattr(Configuration, option):
                raise ConfigError(
                    f"{option} is about the prompt of a vision-language model, and "
                    f"{type(adapter.model).__name__} has none: leave it out"
                )
        adapter.refuse()
        refuse_compiled(adapter.model, adapter.blocks, f"{strategy.name} between blocks")
        self.adapter = adapter
        self._acts: VitStrategy = strategy
        self._passes: dict[int, _Pass] = {}
        super().__init__(adapter.model, configuration)

    @property
    def _pass(self) -> _Pass:
        # Dynamo loses what is set on a threading.local.
        return self._passes.setdefault(threading.get_ident(), _Pass())

    @property
    def tokens(self) -> list[int]:
        return self._pass.tokens

    @property
    def plan(self) -> FusionPlan | None:
        return self._pass.plan

    @property
    def _family(self) -> str:
        return self.adapter.name

    def _place(self, undo: ExitStack) -> None:
        for index, block in enumerate(self.adapter.blocks):
            for handle in self._hooks(index, block):
                undo.callback(handle.remove)

    def _hooks(self, index: int, block: nn.Module) -> Iterator[RemovableHandle]:
        """Place the hooks of one block, one after the other."""
        branch, enter = self.adapter.branch(block), partial(self._enter_block, index)
        yield block.register_forward_pre_hook(Hook(enter, with_kwargs=True), with_kwargs=True)
        yield self.adapter.watch_keys(block, self._note_keys)
        yield branch.first.register_forward_pre_hook(Hook(self._merge))
        yield branch.last.register_forward_hook(Hook(self._set_aside))
        # Before other hooks, which expect what the block returns.
        yield block.register_forward_hook(Hook(self._leave_block), prepend=True)

    def _enter_block(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        now = self._pass
        x: Tensor = args[0]
        batch, n = x.shape[:2]
        if index == 0:
            now.plan = FusionPlan.identity(batch * n, x.device)
            now.tokens = []
            blocks, patches = len(self.adapter.blocks), n - self.adapter.protected
            # Without images there is nothing to merge.
            now.merges = self._acts.merges(blocks, patches) if batch else [0] * blocks
        plan = self._whole_plan(index, batch * n)
        now.tokens.append(plan.num_kept // batch if batch else n)
        now.keys = now.merged = now.branch = None
        if plan.is_identity:
            return None
        bias = self._acts.key_bias(plan.sizes.view(batch, -1))
        kwargs = self.adapter.shorten(
            kwargs,
            plan.survivors.view(batch, -1) % n,
            None if bias is None else bias[:, None, None, :].to(x.dtype),
        )
        rows = x.flatten(0, 1).index_select(0, plan.survivors)
        return (rows.unflatten(0, (batch, -1)), *args[1:]), kwargs

    def _whole_plan(self, index: int, rows: int) -> FusionPlan:
        now = self._pass
        if now.plan is None or index != len(now.tokens) or now.plan.num_source != rows:
            raise AttachError(
                f"block {index} ran after {len(now.tokens)} block(s) of another forward pass; "
                "expected all blocks in order, each once: call the whole model, without gradient "
                "checkpointing"
            )
        return now.plan

    def _note_keys(self, keys: Tensor) -> None:
        self._pass.keys = keys

    def _merge(self, first: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Merge the residual stream after attention, on its way into the second branch."""
        now = self._pass
        x, r = args[0], now.merges[len(now.tokens) - 1]
        if now.plan is None or r == 0:
            return None
        if now.keys is None:
            raise UnsupportedModelError(
                f"block {len(now.tokens) - 1} computed its keys out of the sight of adapter "
                f"{self.adapter.name}; expected it to call the modules that it has"
            )
        step = self._acts.match(now.keys, r, self.adapter.protected)
        if step.is_identity:
            return None
        rows = weighted_mean(step, x.flatten(0, 1), now.plan.sizes)
        now.merged = rows.unflatten(0, (len(x), -1))
        now.plan = now.plan.compose(step)
        return (now.merged, *args[1:])

    def _set_aside(self, last: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Keep the branch, and give the block, whose sum nobody reads, as many rows as it has."""
        now = self._pass
        if now.merged is None:
            return None
        now.branch = output
        return torch.zeros_like(output[:, :1]).expand(-1, now.tokens[-1], -1)

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        now = self._pass
        if now.plan is None or now.plan.is_identity:
            return None
        if now.merged is not None and now.branch is not None:
            output = now.merged + now.branch
        rows = output.flatten(0, 1).index_select(0, now.plan.target)
        return rows.unflatten(0, (len(output), -1))
