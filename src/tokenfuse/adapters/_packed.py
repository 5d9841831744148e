"""Vision towers that pack the patches of all frames into one row, as Qwen's do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys
from tokenfuse.tokens import Modality


class Packed(Adapter):
    """A tower of this kind: queries and keys of its attention."""

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        return [block.attn for block in self.model.base_model.visual.blocks]

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        return packed_frames(module, **call)


def packed_frames(
    module: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> QueriesKeys:
    """Queries and keys of one attention module, called with a row ``(n, D)`` of patches."""
    # The rotation that the tower itself applies, from its own module.
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
    # A frame's patches attend to each other; the attention itself reads these lengths, too.
    lengths = cu_seqlens.diff().tolist()
    queries, keys, _ = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    queries, keys = rotate(queries, keys, *position_embeddings)
    # The patches of one visual token follow each other.
    group = module.config.spatial_merge_size**2
    return QueriesKeys(queries, keys, lengths, module.scaling, group=group)
