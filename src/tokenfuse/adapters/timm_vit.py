"""Vision transformers of timm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from tokenfuse.adapters._hooks import Hook
from tokenfuse.adapters._vit import Branch, VitAdapter
from tokenfuse.errors import UnsupportedModelError

VIT, EVA, ATTENTION = "timm.models.vision_transformer", "timm.models.eva", "timm.layers.attention"
MODELS = (f"{VIT}.VisionTransformer", f"{EVA}.Eva")
BLOCKS = (f"{VIT}.Block", f"{EVA}.EvaBlock")
ATTENTIONS = (f"{ATTENTION}.Attention", f"{ATTENTION}.AttentionRope", f"{EVA}.EvaAttention")


class TimmViT(VitAdapter):
    """timm's VisionTransformer and Eva with pre-norm blocks: ViT, DeiT, DINO, SigLIP, EVA."""

    name: ClassVar[str] = "timm_vit"

    @classmethod
    def matches(cls, model: Any) -> bool:
        return any(f"{c.__module__}.{c.__qualname__}" in MODELS for c in type(model).__mro__)

    def refuse(self) -> None:
        for block in self.blocks:
            attn = getattr(block, "attn", None)
            if not (_computes(block, BLOCKS) and _computes(attn, ATTENTIONS)):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} has a {type(block).__name__} with attention "
                    f"{type(attn).__name__}, where tokens cannot be merged; expected pre-norm "
                    "blocks, attention before MLP, of timm 1.0.20 or later"
                )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    @property
    def protected(self) -> int:
        return int(self.model.num_prefix_tokens)

    def branch(self, block: Any) -> Branch:
        return Branch(block.norm2, block.drop_path2)

    def watch_keys(self, block: Any, tell: Callable[[Tensor], None]) -> RemovableHandle:
        attn = block.attn
        heads = (getattr(attn, "num_kv_heads", attn.num_heads), -1)

        @torch.no_grad()
        def separate(_module: Any, _args: Any, keys: Tensor) -> None:
            tell(keys.unflatten(-1, heads).mean(-2))

        def fused(module: Any, args: Any, qkv: Tensor) -> None:
            separate(module, args, qkv.chunk(3, -1)[1])

        @torch.no_grad()
        def from_weights(_module: Any, args: Any) -> None:
            weight = attn.qkv.weight.chunk(3)[1].unflatten(0, heads).mean(0)
            tell(linear(args[0], weight, attn.k_bias.unflatten(0, heads).mean(0)))

        hook: RemovableHandle
        if attn.qkv is None:
            hook = attn.k_proj.register_forward_hook(Hook(separate))
        elif getattr(attn, "q_bias", None) is not None:
            # EVA adds its biases outside the module, mostly without calling it.
            hook = attn.register_forward_pre_hook(Hook(from_weights))
        else:
            hook = attn.qkv.register_forward_hook(Hook(fused))
        return hook

    def shorten(
        self, arguments: dict[str, Any], kept: Tensor, bias: Tensor | None
    ) -> dict[str, Any]:
        short = arguments if bias is None else arguments | {"attn_mask": bias}
        if arguments.get("attn_mask") is not None or arguments.get("is_causal"):
            raise UnsupportedModelError(
                "attn_mask or is_causal is given, which merged tokens cannot follow; expected "
                "neither under attach: leave them out"
            )
        rope = arguments.get("rope")
        if rope is None:
            return short
        # (N, C), (heads, N, C) or (B, heads, N, C), for patches only: a row for each that is left.
        rope = rope.reshape((1,) * (4 - rope.ndim) + rope.shape)
        patches = kept[:, None, self.protected :, None] - self.protected
        return short | {"rope": torch.take_along_dim(rope, patches, 2)}


def _computes(part: Any, known: Sequence[str]) -> bool:
    """Whether ``forward`` is that of a known class; a subclass may inherit it."""
    forward: Any = getattr(type(part), "forward", _computes)
    return f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward") in known
