"""Vision towers that pack the patches of all frames into one row, as Qwen's do."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys
from tokenfuse.adapters._tower_packed import PackedStage
from tokenfuse.prompt.inputs import PIXELS
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._tower import PixelTokens
from tokenfuse.tokens import Modality


class Packed(Adapter):
    """A tower of this kind: queries and keys of its attention."""

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        return [block.attn for block in self.model.base_model.visual.blocks]

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        return packed_frames(module, **call)


class QwenPacked(Packed):
    """A tower of Qwen's, whose blocks take any number of patches."""

    pixel_scale: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    """Standard deviations by which the family's processor divides pixels."""

    @property
    def cuts_tower(self) -> Literal["tokens"]:
        return "tokens"

    def pixels(self, inputs: Mapping[str, Any], modality: Modality) -> list[PixelTokens]:
        vision, grid = self.model.config.vision_config, inputs[f"{modality}_grid_thw"]
        merge = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        # (patches, channels * frames * rows * columns), the patches of a token one after the other.
        patches = inputs[PIXELS[modality]].unflatten(-1, (channels, -1))
        tokens = patches.unflatten(0, (-1, merge**2)).transpose(1, 2).flatten(2)
        scale = torch.tensor(self.pixel_scale, device=tokens.device)
        sizes = [(t, h // merge, w // merge) for t, h, w in grid.tolist()]
        parts = tokens.split([prod(size) for size in sizes])
        return [PixelTokens(x, size, scale) for x, size in zip(parts, sizes, strict=True)]

    @property
    def tower_blocks(self) -> Sequence[nn.Module]:
        return list(self.model.base_model.visual.blocks)

    def tower_stage(
        self, inputs: Mapping[str, Any], modality: Modality, strategy: Strategy
    ) -> PackedStage:
        grid = inputs[f"{modality}_grid_thw"]
        return PackedStage(self.model.base_model.visual, grid, strategy)


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
