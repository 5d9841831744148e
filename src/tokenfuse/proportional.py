"""Attention of the decoder that weighs a fused token by the tokens that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokenfuse.caches import cache_of
from tokenfuse.errors import UnsupportedModelError

TAKES_A_BIAS = ("sdpa", "eager")
"""Attention implementations of transformers that add a mask of floats to their logits."""

GONE = -1


@dataclass(frozen=True, eq=False)
class Shares:
    """Which keys of a shorter prompt stand for the ``N`` tokens of the whole one.

    ``key (B, N)``: the column of the shorter prompt that each was fused into, or -1.
    ``since (B, N)``: the first of its columns that would have seen it. ``length``: its columns, M.
    """

    key: Int[Tensor, "B N"]
    since: Int[Tensor, "B N"]
    length: int

    @classmethod
    def of(
        cls,
        owner: Int[Tensor, "B N"],
        seen_from: Int[Tensor, "B N"],
        columns: Int[Tensor, "B M"],
        valid: Bool[Tensor, "B M"],
    ) -> Shares:
        """Shares by columns of the whole prompt.

        ``owner``: the column of the token that each was fused into, or -1. ``seen_from``: the first
        column that sees each. ``columns``, ``valid``: those that are left, padding marked false.
        """
        whole, left = owner.shape[1], columns.shape[1]
        slots = torch.arange(left, device=columns.device).expand_as(columns)
        places = columns.new_full((len(columns), whole + 1), left)
        places = places.scatter(1, torch.where(valid, columns, whole), slots)[:, :whole]
        # The place of a token that is gone is that of the next one that is left.
        after = places.flip(-1).cummin(-1).values.flip(-1)
        key = nn.functional.pad(places.masked_fill(places == left, GONE), (0, 1), value=GONE)
        key = key.gather(-1, torch.where(owner == GONE, whole, owner))
        return cls(key, after.gather(-1, seen_from), left)

    def after(self, earlier: Shares, tokens: int) -> Shares:
        """These, but for the first ``tokens``, which are as in the prompt that this one goes on."""
        key = torch.cat([earlier.key[:, :tokens], self.key[:, tokens:]], -1)
        since = torch.cat([earlier.since[:, :tokens], self.since[:, tokens:]], -1)
        return replace(self, key=key, since=since)

    def repeat(self, times: int) -> Shares:
        """Those of a batch whose rows were repeated."""
        key, since = (x.repeat_interleave(times, 0) for x in (self.key, self.since))
        return replace(self, key=key, since=since)

    def counts(self, first: int, queries: int) -> Int[Tensor, "B Q M"]:
        """How many tokens each key stands for, as each of ``queries`` columns from ``first`` sees.

        At least 1.
        """
        # Each token counts from one query on: mark that one, then sum along the queries.
        row = (self.since - first).clamp(0, queries)
        column = torch.where(self.key == GONE, self.length, self.key)
        width = self.length + 1
        marks = row.new_zeros(len(row), (queries + 1) * width, dtype=torch.int32)
        marks.scatter_add_(1, row * width + column, torch.ones_like(row, dtype=torch.int32))
        seen = marks.view(len(row), queries + 1, width)[:, :queries, : self.length]
        return seen.cumsum(1, dtype=torch.int32).clamp_min_(1)


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
    with ExitStack() as hooks:
        for module in attention_modules(model):
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def refuse_fused_kernels(model: Any) -> None:
    """Raise UnsupportedModelError where the model's attention takes no bias."""
    kind = model.config.get_text_config()._attn_implementation
    if kind not in TAKES_A_BIAS:
        raise UnsupportedModelError(
            f"attention: proportional adds to the logits of attention, which {kind} does not take; "
            f"expected {' or '.join(TAKES_A_BIAS)}: load the model with "
            'attn_implementation="sdpa", or use attention: plain'
        )


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
    with before_attention(model, _Bias(shares)):
        yield


class _Bias:
    """A hook that adds to an attention's mask what the keys weigh."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self.whole = shares.counts(shares.length, 1).float().log()
        """What they weigh to all that follows the prompt, ``(B, 1, M)``."""
        self.began = False
        self.cache: Any = None
        # All layers of a kind get the same mask, so that it is made once for them.
        self.last: tuple[Any, tuple[Any, ...], Tensor] | None = None

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        cache = cache_of(kwargs)
        if not self.began:
            self.began, self.cache = True, cache
        if cache is not self.cache:
            # Another prompt, of guidance or of another thread.
            return args, kwargs
        states = args[0] if args else kwargs["hidden_states"]
        mask, length = kwargs.get("attention_mask"), states.shape[1]
        past, width, first = 0, length, 0
        if cache is not None:
            past = int(cache.get_seq_length(module.layer_idx))
            width, first = cache.get_mask_sizes(length, module.layer_idx)
        known = (length, past, width, first, states.dtype, states.device)
        if self.last is None or self.last[0] is not mask or self.last[1] != known:
            if mask is None:
                # What sdpa does of its own accord where there is no mask.
                mask = torch.ones(length, width, dtype=torch.bool, device=states.device)
                mask = mask.tril(past - first)
            weight = self._weight(past, length)[..., first : first + mask.shape[-1]]
            self.last = (kwargs.get("attention_mask"), known, _add(mask, weight, states))
        return args, kwargs | {"attention_mask": self.last[2]}

    def _weight(self, past: int, length: int) -> Tensor:
        """What the keys weigh to ``length`` queries after ``past`` others, ``(B, Q or 1, M)``."""
        if past >= self.shares.length:
            return self.whole
        return self.shares.counts(past, length).float().log_()


def _add(mask: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``mask (..., L, W)`` as floats, with the weights of its first keys added."""
    bias = nn.functional.pad(weight, (0, mask.shape[-1] - weight.shape[-1]))
    bias = bias.repeat_interleave(len(like) // len(bias), 0)[:, None].to(like)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(like.dtype).min)
    return mask + bias
