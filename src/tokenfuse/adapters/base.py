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

from tokenfuse.errors import PromptError
from tokenfuse.plan import FusionPlan
from tokenfuse.realign import (
    PaddingSide,
    Realigned,
    next_position_delta,
    padding_side,
    realign_positions,
    shorten,
)
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


class ModelAdapter(ABC):
    """What every adapter has: a name, the models that it fits, and one of them."""

    name: ClassVar[str]

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def matches(cls, model: Any) -> bool:
        """Whether this adapter fits ``model``."""


class Adapter(ModelAdapter):
    """Hands a transformers model a shorter prompt. Nothing in the model is changed."""

    supplies: ClassVar[frozenset[Need]] = frozenset()
    """What it can give a strategy beside features: ``saliency``, ``text``."""

    @abstractmethod
    def grids(self, inputs: Mapping[str, Any], modality: Modality) -> list[Grid]:
        """``(T, H, W)`` of each item of a modality, after the spatial merge, in prompt order."""

    def position_delta(self) -> Tensor | None:
        """What the model adds to a token count for a rope position, ``(B, 1)``; None in 1-D."""
        return None

    def set_position_delta(self, delta: Tensor | None) -> None:
        """Store the delta that decoding and later turns read. Nothing to do for 1-D rope."""

    def has_visuals(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the inputs bring pixels."""
        return any(inputs.get(name) is not None for name in PIXELS.values())

    def encoder_inputs(self, inputs: Mapping[str, Any], modality: Modality) -> dict[str, Any]:
        """The inputs that the vision tower reads for a modality."""
        known = inspect.signature(self._encoder(modality)).parameters
        return {k: inputs[k] for k in known if k != "kwargs" and inputs.get(k) is not None}

    def encode(self, inputs: Mapping[str, Any]) -> list[Encoded]:
        """Run the vision tower once per modality and return every item as ``VisualTokens``.

        Raises PromptError where features and grid do not agree, TokensError on NaN or Inf (one host
        synchronisation per item).
        """
        encoded = []
        for modality in MODALITIES:
            if inputs.get(PIXELS[modality]) is None:
                continue
            grids = self.grids(inputs, modality)
            arguments = self.encoder_inputs(inputs, modality)
            output = self._encoder(modality)(**arguments, return_dict=True)
            encoded.append(Encoded(modality, output, self._items(modality, output, grids)))
        return encoded

    def _encoder(self, modality: Modality) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self.model.base_model, f"get_{modality}_features")
        return method

    def _items(self, modality: Modality, output: Any, grids: list[Grid]) -> list[VisualTokens]:
        features = output.pooler_output
        if len(features) != len(grids):
            raise PromptError(
                f"the vision tower returned {len(features)} {modality} item(s), the inputs "
                f"describe {len(grids)}: pass the processor's output unchanged"
            )
        return [VisualTokens.from_grid(x, grid) for x, grid in zip(features, grids, strict=True)]

    def fuse(self, encoded: Encoded, plans: Sequence[FusionPlan], strategy: Strategy) -> Any:
        """The vision tower's output after the plans, DeepStack layers too, in its own class."""

        def each(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(strategy.fuse(plan, x) for plan, x in zip(plans, tensors, strict=True))

        fields: dict[str, Any] = {"pooler_output": each(encoded.output.pooler_output)}
        layers = getattr(encoded.output, "deepstack_features", None)
        if layers is not None:
            fields["deepstack_features"] = [each(layer) for layer in layers]
        return type(encoded.output)(**fields)

    def placeholder_id(self, modality: Modality) -> int | None:
        """The token id that stands for one visual token of a modality, None where there is none."""
        token: int | None = getattr(self.model.config, f"{modality}_token_id", None)
        return token

    def kept_columns(self, ids: Tensor, encoded: Sequence[Encoded], plans: Plans) -> Tensor:
        """Which prompt tokens survive, ``(B, L)``: all text, and the plans' visual tokens.

        Raises PromptError where a modality's placeholders are not as many as its features.
        """
        keep = torch.ones_like(ids, dtype=torch.bool)
        for modality in MODALITIES:
            token = self.placeholder_id(modality)
            here = torch.zeros_like(keep) if token is None else ids == token
            masks = [
                plan.keep_mask.to(ids.device)
                for part in encoded
                if part.modality == modality
                for plan in plans[modality]
            ]
            mask = torch.cat(masks) if masks else keep.new_ones(0)
            found = int(here.sum())
            if found != len(mask):
                raise PromptError(
                    f"the prompt shows {found} {modality} placeholder(s), the {modality} features "
                    f"are {len(mask)}: pass input_ids, attention_mask and pixels of one processor "
                    "call, not truncated"
                )
            keep = keep.masked_scatter(here, mask)
        return keep

    def positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Rope positions of the uncompressed prompt, the caller's or by the model's own method."""
        given: Tensor | None = inputs.get("position_ids")
        if given is not None:
            return given
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
        # No placeholder is -1: one that the mask hides is not shown to the model.
        keep = self.kept_columns(ids.masked_fill(mask == 0, -1), encoded, plans)
        last = mask.long().cumsum(-1).argmax(-1, keepdim=True)
        if not bool(keep.gather(-1, last).all()):
            raise PromptError(
                "a prompt ends with a visual token, and the plan removes it; expected text after "
                "the last image or video: let the processor end the prompt"
            )
        positions = self.positions({**inputs, "attention_mask": mask})
        positions = positions.expand(*positions.shape[:-2], len(ids), -1)
        new = shorten(mask, keep, side or padding_side(mask))
        realigned = realign_positions(positions, new, policy)
        short: dict[str, Any] = {
            "input_ids": new.take(ids, self.pad_id() or 0),
            "attention_mask": new.valid.to(mask.dtype),
            "position_ids": realigned,
        }
        for name in PER_TOKEN:
            if inputs.get(name) is not None:
                short[name] = new.take(inputs[name], -100 if name == "labels" else 0)
        self.set_position_delta(next_position_delta(realigned, new))
        return short, new

    def pad_id(self) -> int | None:
        """The padding token of the model, None where it names none."""
        model = self.model
        for config in (model.generation_config, model.config, model.config.get_text_config()):
            pad: int | None = getattr(config, "pad_token_id", None)
            if pad is not None:
                return pad
        return None
