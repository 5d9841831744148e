"""What every adapter does for its model family.

A subclass says which models it fits and what the grid of each item is; everything that is the
same for all transformers VLMs whose ``forward`` takes ``mm_encoder_outputs`` is here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.plan import FusionPlan
from tokenfuse.realign import PaddingSide, Realigned, padding_side, realign_positions, shorten
from tokenfuse.strategies.base import Need, Strategy
from tokenfuse.tokens import Grid, Modality, VisualTokens

Plans = Mapping[Modality, Sequence[FusionPlan]]
"""One plan per item of each encoded modality, in prompt order."""

MODALITIES: tuple[Modality, ...] = ("image", "video")
PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "labels")
"""Model inputs with one column per prompt token, beside input_ids and attention_mask."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The vision tower's output for all items of one modality, and the items as tokens."""

    modality: Modality
    output: Any
    items: list[VisualTokens]


class Adapter(ABC):
    """Hands a transformers model a shorter prompt. Nothing in the model is changed."""

    name: ClassVar[str]
    supplies: ClassVar[frozenset[Need]] = frozenset()
    """What it can give a strategy beside features."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def matches(cls, model: Any) -> bool:
        """Whether this adapter fits ``model``."""

    @abstractmethod
    def grids(self, inputs: Mapping[str, Any], modality: Modality) -> list[Grid]:
        """``(T, H, W)`` of each item of a modality, after the spatial merge, in prompt order."""

    def position_delta(self) -> Tensor | None:
        """What the model adds to a token count to get a rope position, ``(B, 1)``; None for 1-D rope."""
        return None

    def set_position_delta(self, delta: Tensor | None) -> None:
        """Store the delta that decoding and later turns read. Nothing to do for 1-D rope."""

    def has_visuals(self, inputs: Mapping[str, Any]) -> bool:
        return any(inputs.get(name) is not None for name in PIXELS.values())

    def encoder_inputs(self, inputs: Mapping[str, Any], modality: Modality) -> dict[str, Any]:
        """The inputs that the vision tower reads for a modality."""
        known = inspect.signature(self._encoder(modality)).parameters
        return {k: inputs[k] for k in known if k != "kwargs" and inputs.get(k) is not None}

    def encode(self, inputs: Mapping[str, Any]) -> list[Encoded]:
        """Run the vision tower once and return every item as ``VisualTokens``.

        Raises PromptError where features and grid do not agree, TokensError on NaN or Inf (one host
        synchronisation per item).
        """
        encoded = []
        for modality in MODALITIES:
            if inputs.get(PIXELS[modality]) is None:
                continue
            arguments = self.encoder_inputs(inputs, modality)
            output = self._encoder(modality)(**arguments, return_dict=True)
            encoded.append(Encoded(modality, output, self._items(inputs, modality, output)))
        return encoded

    def _encoder(self, modality: Modality) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self.model.base_model, f"get_{modality}_features")
        return method

    def _items(
        self, inputs: Mapping[str, Any], modality: Modality, output: Any
    ) -> list[VisualTokens]:
        features, grids = output.pooler_output, self.grids(inputs, modality)
        if len(features) != len(grids):
            raise PromptError(
                f"the vision tower returned {len(features)} {modality} item(s), the inputs "
                f"describe {len(grids)}: pass the processor's output unchanged"
            )
        return [
            VisualTokens.from_grid(x, grid) for x, grid in zip(features, grids, strict=True)
        ]

    def fuse(self, encoded: Encoded, plans: Sequence[FusionPlan], strategy: Strategy) -> Any:
        """The vision tower's output after the plans, DeepStack layers included, in its own class."""

        def each(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(strategy.fuse(plan, x) for plan, x in zip(plans, tensors, strict=True))

        fields: dict[str, Any] = {"pooler_output": each(encoded.output.pooler_output)}
        layers = getattr(encoded.output, "deepstack_features", None)
        if layers is not None:
            fields["deepstack_features"] = [each(layer) for layer in layers]
        return type(encoded.output)(**fields)

    def placeholder_id(self, modality: Modality) -> int:
        """The token id that stands for one visual token of a modality."""
        token: int = getattr(self.model.config, f"{modality}_token_id")
        return token

    def kept_columns(
        self, ids: Tensor, encoded: Sequence[Encoded], plans: Plans
    ) -> Tensor:
        """Which prompt tokens survive, ``(B, L)``: all text, and the plans' visual tokens.

        Raises PromptError where a modality's placeholders are not as many as its features.
        """
        keep = torch.ones_like(ids, dtype=torch.bool)
        for part in encoded:
            here = ids == self.placeholder_id(part.modality)
            mask = torch.cat([plan.keep_mask for plan in plans[part.modality]]).to(ids.device)
            found = int(here.sum())
            if found != len(mask):
                raise PromptError(
                    f"the prompt has {found} {part.modality} placeholder(s), the "
                    f"{part.modality} features are {len(mask)}: pass input_ids and pixels of one "
                    "processor call, not truncated"
                )
            keep = keep.masked_scatter(here, mask)
        return keep

    def positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Rope positions of the uncompressed prompt, by the model's own method."""
        given = inputs.get("position_ids")
        if given is not None:
            return torch.as_tensor(given)
        method: Callable[..., Tensor] = self.model._prepare_position_ids_for_generation
        return method(inputs["input_ids"], dict(inputs))

    def realign(
        self,
        inputs: Mapping[str, Any],
        encoded: Sequence[Encoded],
        plans: Plans,
        policy: Literal["keep", "contiguous"] = "keep",
        side: PaddingSide | None = None,
    ) -> tuple[dict[str, Any], Realigned]:
        """The shorter prompt: ids, mask, token types, positions, and the model's rope delta."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.ndim != 2:
            raise PromptError(
                f"attention_mask has shape {tuple(mask.shape)}; expected (B, L): a mask of more "
                "dimensions cannot be shortened"
            )
        positions = self.positions({**inputs, "attention_mask": mask})
        positions = positions.expand(*positions.shape[:-2], len(ids), -1)
        new = shorten(mask, self.kept_columns(ids, encoded, plans), side or padding_side(mask))
        short: dict[str, Any] = {
            "input_ids": new.take(ids, self._pad_id()),
            "attention_mask": new.valid.to(mask.dtype),
            "position_ids": realign_positions(positions, new, policy),
        }
        for name in PER_TOKEN:
            if inputs.get(name) is not None:
                short[name] = new.take(inputs[name], -100 if name == "labels" else 0)
        delta = self.position_delta()
        if delta is not None:
            moved = delta + new.removed[:, None].to(delta.device)
            self.set_position_delta(moved if policy == "keep" else torch.zeros_like(delta))
        return short, new

    def _pad_id(self) -> int:
        configs = (self.model.generation_config, self.model.config, self.model.config.get_text_config())
        for config in configs:
            pad = getattr(config, "pad_token_id", None)
            if pad is not None:
                return int(pad)
        return 0
