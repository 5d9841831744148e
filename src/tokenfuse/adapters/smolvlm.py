"""SmolVLM and Idefics3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._saliency import QueriesKeys, calls, listen, square_frames
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.strategies._base import Attention, Need
from tokenfuse.tokens import Modality


class SmolVLM(Adapter):
    """SmolVLM and Idefics3: square tiles, each an item, or a frame of a video; 1-D rope.

    Pixel shuffling makes one token of a square of patches. There is no class token. Images of
    zeros, which make all prompts of a batch equally long, are no items.
    """

    name: ClassVar[str] = "smolvlm"
    supplies: ClassVar[frozenset[Need]] = frozenset({"saliency", "text"})
    family: ClassVar[tuple[str, ...]] = ("smolvlm", "idefics3")

    @contextmanager
    def listen(
        self, attention: Attention | None, inputs: Mapping[str, Any], modality: Modality
    ) -> Iterator[list[Tensor]]:
        tower, group = self.model.base_model.vision_model, self.model.config.scale_factor**2

        def queries_keys(module: Any, hidden_states: Tensor, **_: Any) -> QueriesKeys:
            shown = towers[-1].get("patch_attention_mask")
            if shown is not None and not bool(shown.all()):
                raise UnsupportedModelError(
                    "pixel_attention_mask hides patches of an image, between which attention is "
                    "not read; expected ones for every image: let the processor resize images "
                    "rather than pad them, or choose a strategy without saliency"
                )
            return square_frames(module, hidden_states, group=group)

        blocks = [layer.self_attn for layer in tower.encoder.layers]
        with calls(tower) as towers, listen(blocks, attention, queries_keys) as heard:
            yield heard
