"""Saliency: the attention that visual tokens get in a block of the vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenfuse.adapters._hooks import Hook
from tokenfuse.errors import ConfigError
from tokenfuse.ops.attention import attention_received, mean_query_attention
from tokenfuse.strategies._base import Attention


class QueriesKeys(NamedTuple):
    """Queries and keys ``(n, heads, d)`` of one call of a vision attention, RoPE included.

    ``lengths``: tokens per frame, in order. ``scale``: what products are multiplied with.
    ``prefix``: tokens at the beginning of each frame that are no patches, the class token first.
    ``group``: patches that become one visual token, consecutive ones or, where a frame's patches
    are a raster of ``columns``, a square of them.
    """

    queries: Tensor
    keys: Tensor
    lengths: Sequence[int]
    scale: float
    prefix: int = 0
    group: int = 1
    columns: int = 0


@contextmanager
def listen(
    modules: Sequence[torch.nn.Module],
    attention: Attention,
    queries_keys: Callable[..., QueriesKeys],
) -> Iterator[list[Tensor]]:
    """Collect the saliency of each call of one of the attention modules, call by call.

    Inside the block only the calls of the thread that entered it are heard: another thread may
    encode on the same model meanwhile. ``queries_keys(module, **call)`` is asked about each.

    Raises ConfigError if there is no such vision block.
    """
    if not -len(modules) <= attention.block < len(modules):
        raise ConfigError(
            f"block: {attention.block} is not a vision block of this model, which has "
            f"{len(modules)}; expected {-len(modules)}..{len(modules) - 1}"
        )
    score = attention_received if attention.query == "each" else mean_query_attention
    heard: list[Tensor] = []
    listener = get_ident()

    @torch.no_grad()
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == listener:
            heard.append(score(*queries_keys(module, **_by_name(module, args, kwargs))))

    placed = Hook(hook, with_kwargs=True)
    handle = modules[attention.block].register_forward_pre_hook(placed, with_kwargs=True)
    try:
        yield heard
    finally:
        handle.remove()


def _by_name(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    given: dict[str, Any] = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    more = given.pop("kwargs", {})
    return {**given, **more}


def square_frames(
    module: Any, hidden_states: Tensor, prefix: int = 0, group: int = 1, **more: Any
) -> QueriesKeys:
    """Queries and keys of a ViT's attention, called with square frames ``(frames, n, D)``.

    ``prefix``: tokens that are no patches. ``group``: patches of the square that is one token.
    ``more`` that the attention is called with says nothing about them.
    """
    frames, n = hidden_states.shape[:2]
    queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    heads = (-1, module.num_heads, module.head_dim)
    return QueriesKeys(
        queries.reshape(heads),
        keys.reshape(heads),
        [n] * frames,
        module.scale,
        prefix,
        group,
        isqrt(n - prefix),
    )
