"""Attention of the decoder that weighs a fused token by the tokens that it stands for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenfuse.adapters._hooks import Hook
from tokenfuse.compression import refuse_fused_kernels
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.prompt.cache import cache_of
from tokenfuse.prompt.shares import Shares

AT_A_TIME = 512
"""Queries whose keys are counted at once."""


def attention_modules(model: Any) -> list[nn.Module]:
    """The attentions of a transformers model's decoder, not those of linear attention.

    Raises UnsupportedModelError where there is none.
    """
    found = [
        module
        for module in model.get_decoder().modules()
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")
    ]
    if not found:
        raise UnsupportedModelError(
            f"no attention was found in the decoder of {type(model).__name__}; expected modules "
            "with layer_idx and num_key_value_groups, as transformers has them"
        )
    return found


@contextmanager
def before_attention(model: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(module, args, kwargs)`` before each attention of the decoder inside the block.

    Raises UnsupportedModelError where there is none.
    """
    placed = Hook(hook, with_kwargs=True)
    with ExitStack() as hooks:
        for module in attention_modules(model):
            hooks.enter_context(module.register_forward_pre_hook(placed, with_kwargs=True))
        yield


@contextmanager
def proportional_attention(model: Any, shares: Shares | None) -> Iterator[None]:
    """Add to the logits of a prompt's keys the log of the tokens they stand for, inside the block.

    A token that was fused from ``s`` alike ones then gets the attention that these would have got
    together. For a query inside the prompt only those count that it would have seen: what was fused
    from later frames has not been shown yet. ``shares`` belong to the prompt that the model reads
    first in the block, or has in the cache that it reads first; what follows that prompt counts
    once, and prompts in other caches are read as ever. Rows may be repeated, as for beams. None
    changes nothing.

    Raises UnsupportedModelError where attention takes no bias, or where a backward pass would run
    the layers again without it.

    Source: proportional attention, Token Merging (arXiv 2210.09461), section 3, there in a vision
    transformer, where every token sees all others. That a causal query counts what came before it
    is ours.
    """
    if shares is None:
        yield
        return
    refuse_fused_kernels(model)
    repeated = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if model.training and repeated:
        raise UnsupportedModelError(
            "attention: proportional acts in the forward pass only, and gradient checkpointing "
            "repeats it in the backward pass: switch that off, or use attention: plain"
        )
    bias = _Bias(shares)
    with before_attention(model, bias):
        yield
    if not bias.began:
        raise UnsupportedModelError(
            f"the attentions of {type(model).__name__} ran without their hooks, so that attention: "
            "proportional had no effect; expected a model that was not compiled before: call "
            "torch.compiler.reset(), attach, then compile"
        )


class _Bias:
    """A hook that adds to an attention's mask what the keys weigh, for one call of the model.

    Other threads call the same modules: their calls are not this one's.
    """

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self.thread = threading.get_ident()
        self.whole = shares.counts(shares.num_keys, 1).float().log()
        """What they weigh to all that follows the prompt, ``(B, 1, M)``."""
        self.began = False
        self.cache: Any = None
        # All layers of a kind get the same mask, so that it is made once for them. While the mask
        # is held here, its id is nobody else's.
        self.made: dict[tuple[Any, ...], tuple[Any, Tensor]] = {}
        self.step: tuple[int, int] | None = None

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != self.thread:
            return None
        cache = cache_of(kwargs)
        if not self.began:
            self.began, self.cache = True, cache
        if cache is not self.cache:
            # Another prompt, such as that of guidance.
            return None
        states = args[0] if args else kwargs["hidden_states"]
        mask, queries = kwargs.get("attention_mask"), states.shape[1]
        past, width, first = 0, queries, 0
        if cache is not None:
            past = int(cache.get_seq_length(module.layer_idx))
            width, first = cache.get_mask_sizes(queries, module.layer_idx)
        if self.step != (past, queries):
            self.step, self.made = (past, queries), {}
        kind = (id(mask), width, first, states.dtype, states.device)
        if kind not in self.made:
            self.made[kind] = (mask, self._biased(mask, past, width, first, states))
        return args, kwargs | {"attention_mask": self.made[kind][1]}

    def _biased(
        self, mask: Tensor | None, past: int, width: int, first: int, states: Tensor
    ) -> Tensor:
        """The mask ``(..., L, W)`` as floats, with what its keys from ``first`` on weigh."""
        queries = states.shape[1]
        if mask is None:
            # What sdpa does of its own accord where there is no mask.
            mask = torch.ones(queries, width, dtype=torch.bool, device=states.device)
            mask = mask.tril(past - first)
        mask = mask.expand(*mask.shape[:-2], queries, mask.shape[-1])
        # Some at a time: counting takes several numbers for each query and key.
        parts = []
        for start in range(0, queries, AT_A_TIME):
            part = mask[..., start : start + AT_A_TIME, :]
            weight = self._weight(past + start, part.shape[-2])
            parts.append(_add(part, weight[..., first : first + part.shape[-1]], states))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def _weight(self, past: int, queries: int) -> Tensor:
        """What the keys weigh to ``queries`` after ``past`` others, ``(B, Q or 1, M)``."""
        if past >= self.shares.num_keys:
            return self.whole
        return self.shares.counts(past, queries).float().log_()


def _add(mask: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``mask (..., Q, W)`` as floats, with the weights of its first keys added."""
    weight = weight.to(like)
    if len(like) != len(weight):
        weight = weight.repeat_interleave(len(like) // len(weight), 0)
    bias = nn.functional.pad(weight, (0, mask.shape[-1] - weight.shape[-1]))[:, None]
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(like.dtype).min)
    return mask + bias
