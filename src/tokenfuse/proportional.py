"""Attention of the decoder that weighs a fused token by the tokens that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
def proportional_attention(model: Any, sizes: Int[Tensor, "B M"] | None) -> Iterator[None]:
    """Add ``log sizes`` to the logits of the first ``M`` keys of a prompt, inside the block.

    A token that was fused from ``s`` alike ones then gets the attention that these would have got
    together. ``sizes (B, M)`` belong to the prompt that the model reads first in the block, or has
    in the cache that it reads first; what follows that prompt counts once, and prompts in other
    caches are read as ever. Rows may be repeated, as for beams. None changes nothing.

    Raises UnsupportedModelError where attention takes no bias, or where a backward pass would run
    the layers again without it.

    Source: proportional attention, Token Merging (arXiv 2210.09461), section 3.
    """
    if sizes is None:
        yield
        return
    refuse_fused_kernels(model)
    repeated = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if model.training and repeated:
        raise UnsupportedModelError(
            "attention: proportional acts in the forward pass only, and gradient checkpointing "
            "repeats it in the backward pass: switch that off, or use attention: plain"
        )
    with before_attention(model, _Bias(sizes.float().log())):
        yield


class _Bias:
    """A hook that adds to an attention's mask what the keys weigh, ``(B, M)`` fp32."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
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
            self.last = (kwargs.get("attention_mask"), known, self._add(mask, first, states))
        return args, kwargs | {"attention_mask": self.last[2]}

    def _add(self, mask: Tensor, first: int, like: Tensor) -> Tensor:
        """``mask (..., L, W)`` as floats, with the weights of the keys from ``first`` on."""
        width = mask.shape[-1]
        weight = self.weight[:, first : first + width]
        bias = nn.functional.pad(weight, (0, width - weight.shape[1]))
        bias = bias.repeat_interleave(len(like) // len(bias), 0)[:, None, None].to(like)
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(like.dtype).min)
        return mask + bias
