"""What every adapter does for its model family.

A subclass says which models it fits and what the grid of each item is; everything that is the
same for all transformers VLMs whose ``forward`` takes ``mm_encoder_outputs`` is here.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenfuse.adapters.supply import mismatch, prompt_texts
from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.plan import FusionPlan
from tokenfuse.realign import (
    PaddingSide,
    Realigned,
    next_position_delta,
    padding_side,
    realign_positions,
    shorten,
)
from tokenfuse.strategies.base import Attention, Need, Strategy, Wants
from tokenfuse.tokens import Grid, Modality, VisualTokens

Plans = Mapping[Modality, Sequence[FusionPlan]]
"""One plan per item of each encoded modality, in prompt order."""

MODALITIES: tuple[Modality, ...] = ("image", "video")
PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
FEATURES_ONLY = Wants()
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

    supplies: ClassVar[frozenset[Need]] = frozenset({"text"})
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

    def encode(self, inputs: Mapping[str, Any], wants: Wants = FEATURES_ONLY) -> list[Encoded]:
        """Run the vision tower once per modality and return every item as ``VisualTokens``.

        ``wants`` says which saliency and whether the prompt's text come with them.

        Raises PromptError where features and grid do not agree, TokensError on NaN or Inf (one host
        synchronisation per item), ConfigError where the model has no such vision block.
        """
        grids = {
            modality: self.grids(inputs, modality)
            for modality in MODALITIES
            if inputs.get(PIXELS[modality]) is not None
        }
        texts = self._texts(inputs, grids) if wants.text else {}
        encoded = []
        for modality, sizes in grids.items():
            arguments = self.encoder_inputs(inputs, modality)
            with self.listen(wants.attention) as heard:
                output = self._encoder(modality)(**arguments, return_dict=True)
            if wants.attention and not heard:
                raise UnsupportedModelError(
                    f"vision block {wants.attention.block} of {type(self.model).__name__} did not "
                    "run, so that its attention cannot be read: choose another block"
                )
            saliency = torch.cat(heard).split([prod(grid) for grid in sizes]) if heard else None
            items = self._items(modality, output, sizes, saliency, texts.get(modality))
            encoded.append(Encoded(modality, output, items))
        return encoded

    def listen(self, attention: Attention | None) -> AbstractContextManager[list[Tensor]]:
        """Collect the saliency ``(N,)`` of every call of the vision tower inside the block.

        An adapter that supplies saliency overrides this, with ``supply.listen``.
        """
        return nullcontext([])

    def _texts(
        self, inputs: Mapping[str, Any], grids: Mapping[Modality, Sequence[Grid]]
    ) -> dict[Modality, list[Tensor]]:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        config = self.model.config
        names = ("vision_start_token_id", "vision_end_token_id")
        markers = [getattr(config, name, None) for name in names]
        placeholders = {m: (ids == self.placeholder_id(m)) & text for m in grids}
        for token in (*markers, *map(self.placeholder_id, MODALITIES)):
            if token is not None:
                text = text & (ids != token)
        sizes = {modality: [prod(grid) for grid in items] for modality, items in grids.items()}
        return prompt_texts(self.model.get_input_embeddings(), ids, text, placeholders, sizes)

    def _encoder(self, modality: Modality) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self.model.base_model, f"get_{modality}_features")
        return method

    def _items(
        self,
        modality: Modality,
        output: Any,
        grids: list[Grid],
        saliency: Sequence[Tensor] | None,
        texts: Sequence[Tensor] | None,
    ) -> list[VisualTokens]:
        features = output.pooler_output
        if len(features) != len(grids):
            raise PromptError(
                f"the vision tower returned {len(features)} {modality} item(s), the inputs "
                f"describe {len(grids)}: pass the processor's output unchanged"
            )
        return [
            VisualTokens.from_grid(
                x,
                grid,
                saliency=None if saliency is None else saliency[i],
                text=None if texts is None else texts[i],
            )
            for i, (x, grid) in enumerate(zip(features, grids, strict=True))
        ]

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
                raise mismatch(modality, found, len(mask))
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
