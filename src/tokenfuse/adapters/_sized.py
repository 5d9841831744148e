"""Attention of a vision tower that weighs each patch by what it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tokenfuse.adapters._hooks import Hook

NAME = "tokenfuse_sized"
"""What transformers calls the attention that does so."""


class WithKernel:
    """The config of an attention, but for which kernel it uses."""

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def with_kernel(module: Any, name: str) -> Any:
    """An object that computes what a module of transformers does, by another kernel.

    The module stays as it is.
    """
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin)["config"] = WithKernel(module.config, name)
    return twin


class SizedAttention:
    """Proportional attention, arXiv 2210.09461: each key counts as often as it stands for patches.

    ``sizes (n,)``: how many patches each one stands for, in the order of the rows that the
    attention reads; None as long as all stand for themselves. ``calls``: how many were weighed.
    """

    def __init__(self) -> None:
        self.sizes: Tensor | None = None
        self.calls = 0
        self._call: tuple[Any, dict[str, Any]] | None = None

    def place(self, attention: Any, hooks: ExitStack, here: Callable[[], bool]) -> None:
        """Hook one attention, in the calls that are ``here``; ``hooks`` takes it away again."""

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if not here() or self.sizes is None:
                return None
            # Its own kernel takes no sizes. It is given one row, and what is read of the call is
            # computed after it.
            self._call = (args, kwargs)
            one = {name: _first(name, value) for name, value in kwargs.items()}
            return tuple(x[:1] for x in args[:1]) + tuple(args[1:]), one

        def leave(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
            if not here():
                return None
            call, self._call = self._call, None
            if call is None or self.sizes is None or not output:
                return None
            self.calls += 1
            return _computed(module, *call, self.sizes)

        hooks.enter_context(
            attention.register_forward_pre_hook(Hook(enter, with_kwargs=True), with_kwargs=True)
        )
        hooks.enter_context(
            attention.register_forward_hook(Hook(leave, with_kwargs=True), with_kwargs=True)
        )


def _first(name: str, value: Any) -> Any:
    if name == "cu_seqlens":
        return torch.arange(2, dtype=value.dtype, device=value.device)
    if name == "hidden_states":
        return value[:1]
    if isinstance(value, tuple):
        return tuple(x[:1] for x in value)
    return None if name == "max_seqlen" else value


def _computed(module: Any, args: Any, kwargs: dict[str, Any], sizes: Tensor) -> Tensor:
    _register()
    twin = with_kernel(module, NAME)
    lengths: list[int] = kwargs["cu_seqlens"].diff().tolist()
    vars(twin)["tokenfuse_sizes"] = iter(sizes.split(lengths))
    made: Tensor = type(module).forward(twin, *args, **kwargs)
    return made


def _weigh(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    # exp(logit + log size) is size * exp(logit).
    bias = next(module.tokenfuse_sizes).log().to(query.dtype)
    made = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias.expand(1, 1, query.shape[2], -1),
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    return made.transpose(1, 2).contiguous(), None


@functools.cache
def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _weigh)
