"""Images cut into tiles that are joined again, as in LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenfuse.adapters._base import Adapter
from tokenfuse.adapters._spans import Span
from tokenfuse.errors import PromptError
from tokenfuse.prompt.inputs import Prompt
from tokenfuse.prompt.text import mismatch
from tokenfuse.tokens import Modality


class AnyRes(Adapter):
    """Images as tiles: a small whole, then all others joined, a newline after each row.

    The margins that make an image fit its tiles are cut off. The model's own function lays out the
    tokens, so that a prompt which does not fit ``image_sizes`` is refused before the tower runs.
    """

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """How many tiles each image has."""
        config, base = self.model.config, self.model.base_model
        count = sys.modules[type(base).__module__].image_size_to_num_patches
        side = config.vision_config.image_size
        return [count(size, config.image_grid_pinpoints, side) for size in inputs["image_sizes"]]

    def packing(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model's ``pack_image_features`` reads beside features, sizes and newline."""
        return {"vision_feature_select_strategy": "full"}  # decides about a warning alone

    def pack(
        self, inputs: Mapping[str, Any], patches: Tensor, newline: Tensor | None
    ) -> list[Tensor]:
        """What the model makes of values ``(tiles, n, D)`` of patches: ``(n, D)`` per image."""
        packed: list[Tensor] = self.model.base_model.pack_image_features(
            patches.split(self.tiles(inputs)),
            inputs["image_sizes"],
            image_newline=newline,
            **self.packing(inputs),
        )[0]
        return packed

    @property
    def side(self) -> int:
        """Patches in each row and column of a tile."""
        side: int = self.model.config.vision_config.image_size
        return side // int(self.model.config.vision_config.patch_size)

    def spans(
        self, inputs: Mapping[str, Any], modality: Modality, entries: Sequence[Tensor]
    ) -> list[Span]:
        if modality == "video":
            return super().spans(inputs, modality, entries)
        side, found = self.side, list[Span]()
        for packed in self._blank(inputs):
            rows = int(packed.sum())
            columns = (len(packed) - side**2) // max(rows, 1) - 1
            if columns > 0:
                found += [Span((1, side, side)), Span((1, rows, columns), per_row=1)]
            else:  # one tile, or an image so narrow that it is all margin
                found.append(Span((1, side, side), tail=rows))
        return found

    def _blank(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The features ``(n, 1)`` of each image, ones for newlines among zeros."""
        blank = torch.zeros(sum(self.tiles(inputs)), self.side**2, 1)
        return self.pack(inputs, blank, torch.ones(1))

    def feature_counts(self, prompt: Prompt, modality: Modality) -> list[int] | None:
        inputs = prompt.inputs
        if modality == "video":
            return super().feature_counts(prompt, modality)
        # Tiles of several images in one row of pixels do not say whose they are; batch_num_images
        # decides how images are cut, and counts all of them.
        read = self.encoder_inputs(inputs, modality).keys()
        if inputs["pixel_values"].ndim != 5 or read != {"pixel_values", "image_sizes"}:
            return None
        return [len(packed) for packed in self._blank(inputs)]

    def check(self, prompt: Prompt, modality: Modality) -> None:
        super().check(prompt, modality)
        inputs = prompt.inputs
        if modality == "video":
            return
        if inputs.get("image_sizes") is None:
            raise PromptError(
                "image_sizes is missing beside pixel_values; expected (images, 2): pass all that "
                "the processor returns"
            )
        tiles, given = self.tiles(inputs), tuple(inputs["pixel_values"].shape[:-3])
        # Of tiles that padding adds the model reads none.
        fit = given[:1] == (len(tiles),) and given[1:] >= (max(tiles, default=0),)
        if not (fit if len(given) == 2 else given == (sum(tiles),)):
            raise PromptError(
                f"pixel_values hold {given} tiles, image_sizes describe {tiles}: pass all that one "
                "processor call returns"
            )
        shown = int(prompt.here[modality].sum())
        described = sum(span.size for span in self.spans(inputs, modality, ()))
        if shown != described:
            raise mismatch(modality, shown, described)
