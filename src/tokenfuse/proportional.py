"""Attention of the decoder that weighs a fused token by the tokens that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tokenfuse.caches import cache_of
from tokenfuse.errors import UnsupportedModelError

TAKES_A_BIAS = ("sdpa", "eager")
"""Attention implementations of transformers that add a mask of floats to their logits."""


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
def proportional_attention(model: Any, sizes: Int[Tensor, "B M"] | None) -> Iterator[None]:
    """Add ``log sizes`` to the logits of the first ``M`` keys of a prompt, inside the block.

    A token that was fused from ``s`` alike ones then gets the attention that these would have got
    together. ``sizes (B, M)`` belong to the prompt that the model reads or has in its cache; what
    follows it counts once. Rows may be repeated, as for beams. None changes nothing.

    Source: proportional attention, Token Merging (arXiv 2210.09461), section 3.
    """
    if sizes is None:
        yield
        return
    hook = _Bias(sizes.float().log())
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in attention_modules(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Bias:
    """A hook that adds to an attention's mask what the keys weigh, ``(B, M)`` fp32."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        # All layers of a kind get the same mask, so that it is made once for them.
        self.last: tuple[Any, int, Tensor] | None = None

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        mask, length = kwargs.get("attention_mask"), states.shape[1]
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
        total = past + length
        if self.last is None or self.last[0] is not mask or self.last[1] != total:
            self.last = (mask, total, self._mask(mask, length, total, states))
        return args, kwargs | {"attention_mask": self.last[2]}

    def _mask(self, mask: Tensor | None, length: int, total: int, like: Tensor) -> Tensor:
        width = total if mask is None else mask.shape[-1]
        # A sliding window holds the last keys only; a static cache has room for more.
        first = max(0, total - width)
        weight = self.weight[:, first : first + width]
        bias = nn.functional.pad(weight, (0, width - weight.shape[1]))
        bias = bias.repeat_interleave(len(like) // len(bias), 0)[:, None, None].to(like)
        if mask is None:
            mask = torch.ones(length, total, dtype=torch.bool, device=like.device)
            mask = mask.tril(total - length)
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(like.dtype).min)
        return mask + bias
