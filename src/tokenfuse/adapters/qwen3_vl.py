"""Qwen3-VL, dense and mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters.base import PIXELS, Adapter
from tokenfuse.adapters.supply import QueriesKeys, listen
from tokenfuse.errors import PromptError
from tokenfuse.strategies.base import Attention, Need
from tokenfuse.tokens import Grid, Modality

FAMILY = ("qwen3_vl", "qwen3_vl_moe")


class Qwen3VL(Adapter):
    """Qwen3-VL: a timestamp before every frame, DeepStack features, M-RoPE of four rows."""

    name: ClassVar[str] = "qwen3_vl"
    supplies: ClassVar[frozenset[Need]] = frozenset({"saliency", "text"})

    @classmethod
    def matches(cls, model: Any) -> bool:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        # The base model, and a wrapper such as PEFT's, have the model type but not its layout.
        return kind in FAMILY and hasattr(getattr(model, "model", None), "rope_deltas")

    def grids(self, inputs: Mapping[str, Any], modality: Modality) -> list[Grid]:
        patches = inputs.get(f"{modality}_grid_thw")
        if patches is None:
            raise PromptError(
                f"{modality}_grid_thw is missing beside the pixels; expected (items, 3): pass all "
                "that the processor returns"
            )
        described, given = int(patches.prod(-1).sum()), len(inputs[PIXELS[modality]])
        if described != given:
            raise PromptError(
                f"{PIXELS[modality]} hold {given} patches, {modality}_grid_thw describes "
                f"{described}: pass all that one processor call returns"
            )
        merge = self.model.config.vision_config.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in patches.tolist()]

    def positions(self, inputs: Mapping[str, Any]) -> Tensor:
        if inputs.get("position_ids") is None and inputs.get("mm_token_type_ids") is None:
            raise PromptError(
                "mm_token_type_ids is missing, without which the model counts visual tokens as "
                "text; expected (B, L): pass all that the processor returns"
            )
        positions = super().positions(inputs)
        return positions if positions.ndim == 3 else positions.expand(4, *positions.shape)

    def listen(self, attention: Attention | None) -> AbstractContextManager[list[Tensor]]:
        blocks = [block.attn for block in self.model.model.visual.blocks]
        return listen(blocks, attention, _queries_keys)

    def position_delta(self) -> Tensor | None:
        delta: Tensor | None = self.model.model.rope_deltas
        return delta

    def set_position_delta(self, delta: Tensor | None) -> None:
        self.model.model.rope_deltas = delta


def _queries_keys(
    module: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> QueriesKeys:
    # Not above: listing what is registered loads no model code.
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    # A frame's patches attend to each other; the attention itself reads these lengths, too.
    lengths = cu_seqlens.diff().tolist()
    queries, keys, _ = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    queries, keys = apply_rotary_pos_emb_vision(queries, keys, *position_embeddings)
    # The patches of one visual token follow each other.
    group = module.config.spatial_merge_size**2
    return QueriesKeys(queries, keys, lengths, module.scaling, group=group)
