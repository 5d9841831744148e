"""``attach`` for vision transformers: fewer tokens from block to block."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tokenfuse.adapters._vit import VitAdapter
from tokenfuse.errors import AttachError, ConfigError, UnsupportedModelError
from tokenfuse.ops.matching import weighted_mean
from tokenfuse.plan import FusionPlan
from tokenfuse.registry import Registry
from tokenfuse.sessions.vlm import MARK, Session, refuse_attached
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._vit import VitStrategy


class VitSession(Session):
    """An attached vision transformer. There is no prompt, so ``report`` stays None.

    ``tokens``: how many tokens of an image entered each block at the last forward pass.
    ``plan``: what became of the ``B * N`` tokens of its images, which are counted one image after
    the other.

    Every block still returns a row for every token; merged tokens have equal rows. So pooling,
    heads and dense features work as ever, and a mean weighs each token by what it stands for.
    """

    adapter: VitAdapter  # type: ignore[assignment] # a session of another kind of model

    def __init__(self, adapter: VitAdapter, strategy: Strategy, registry: Registry) -> None:
        if not isinstance(strategy, VitStrategy):
            fit = (
                name for name, e in registry.strategies.items() if issubclass(e.cls, VitStrategy)
            )
            raise UnsupportedModelError(
                f"strategy {strategy.name} shortens the prompt of a vision-language model, and "
                f"{type(adapter.model).__name__} has none; expected one that acts inside a vision "
                f"transformer: {', '.join(sorted(fit))}"
            )
        for option in strategy.about_prompts():
            raise ConfigError(
                f"{option} is about the prompt of a vision-language model, and "
                f"{type(adapter.model).__name__} has none: leave it out"
            )
        adapter.refuse()
        self.model = adapter.model
        self.strategy = strategy
        self.adapter = adapter
        self.report = None
        self.tokens: list[int] = []
        self.plan: FusionPlan | None = None
        self._acts: VitStrategy = strategy
        self._hooks = ExitStack()
        self._merges: list[int] = []
        self._keys: Tensor | None = None
        self._merged: Tensor | None = None
        self._branch: Tensor | None = None

    def __enter__(self) -> VitSession:
        refuse_attached(self.model)
        with ExitStack() as hooks:
            for index, block in enumerate(self.adapter.blocks):
                enter, branch = partial(self._enter_block, index), self.adapter.branch(block)
                place = hooks.enter_context
                place(block.register_forward_pre_hook(enter, with_kwargs=True))
                place(self.adapter.watch_keys(block, self._note_keys))
                place(branch.first.register_forward_pre_hook(self._merge))
                place(branch.last.register_forward_hook(self._set_aside))
                # Before other hooks, which expect what the block returns.
                place(block.register_forward_hook(self._leave_block, prepend=True))
            setattr(self.model, MARK, self)
            hooks.callback(delattr, self.model, MARK)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()
        self._keys = self._merged = self._branch = None

    def _enter_block(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x: Tensor = args[0]
        batch, n = x.shape[:2]
        if index == 0:
            self.plan = FusionPlan.identity(batch * n, x.device)
            self.tokens = []
            blocks, patches = len(self.adapter.blocks), n - self.adapter.protected
            # Without images there is nothing to merge.
            self._merges = self._acts.merges(blocks, patches) if batch else [0] * blocks
        plan = self._whole_plan(index, batch * n)
        self.tokens.append(plan.num_kept // batch if batch else n)
        self._keys = self._merged = self._branch = None
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
        if self.plan is None or index != len(self.tokens) or self.plan.num_source != rows:
            raise AttachError(
                f"block {index} ran after {len(self.tokens)} block(s) of another forward pass; "
                "expected all blocks in order, each once: call the whole model, without gradient "
                "checkpointing"
            )
        return self.plan

    def _note_keys(self, keys: Tensor) -> None:
        self._keys = keys

    def _merge(self, first: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Merge the residual stream after attention, on its way into the second branch."""
        x, r = args[0], self._merges[len(self.tokens) - 1]
        if self.plan is None or r == 0:
            return None
        if self._keys is None:
            raise UnsupportedModelError(
                f"block {len(self.tokens) - 1} computed its keys out of the sight of adapter "
                f"{self.adapter.name}; expected it to call the modules that it has"
            )
        step = self._acts.match(self._keys, r, self.adapter.protected)
        if step.is_identity:
            return None
        rows = weighted_mean(step, x.flatten(0, 1), self.plan.sizes)
        self._merged = rows.unflatten(0, (len(x), -1))
        self.plan = self.plan.compose(step)
        return (self._merged, *args[1:])

    def _set_aside(self, last: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Keep the branch, and give the block, whose sum nobody reads, as many rows as it has."""
        if self._merged is None:
            return None
        self._branch = output
        return torch.zeros_like(output[:, :1]).expand(-1, self.tokens[-1], -1)

    def _leave_block(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if self.plan is None or self.plan.is_identity:
            return None
        if self._merged is not None and self._branch is not None:
            output = self._merged + self._branch
        rows = output.flatten(0, 1).index_select(0, self.plan.target)
        return rows.unflatten(0, (len(output), -1))
