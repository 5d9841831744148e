"""What every adapter does for its model family.

A subclass says which models it fits and what is particular to them; everything that is the same for
all transformers VLMs whose ``forward`` takes ``mm_encoder_outputs`` is here.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokenfuse.adapters import _spans as layout
from tokenfuse.adapters._spans import Span, flat
from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.prompt.realign import (
    PaddingSide,
    Realigned,
    next_position_delta,
    padding_side,
    realign_positions,
    shorten,
)
from tokenfuse.prompt.text import mismatch, prompt_texts
from tokenfuse.strategies._base import Attention, Need, Needs
from tokenfuse.tokens import Modality, VisualTokens

Plans = Mapping[Modality, Sequence[FusionPlan]]
"""One plan per item of each encoded modality, in prompt order."""

Fuse = Callable[[FusionPlan, Tensor], Tensor]
"""Applies a plan to features ``(N, D)``: ``(M, D)``."""

MODALITIES: tuple[Modality, ...] = ("image", "video")
PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "labels")
"""Model inputs with one column per prompt token, beside input_ids and attention_mask."""
READ = {"last_hidden_state", "pooler_output", "hidden_states", "attentions", "deepstack_features"}
"""Fields of a vision tower's output; of these, models read the pooled and the DeepStack ones."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The vision tower's output for all items of one modality, and the items as tokens.

    ``kind``: what the items are; an image-only model's images may be the frames of videos.
    ``spans``: where the tokens of each item are among the tower's features.
    """

    modality: Modality
    output: Any
    items: list[VisualTokens]
    kind: Modality
    spans: list[Span]

    def keep_mask(self, plans: Sequence[FusionPlan]) -> Tensor:
        """Which of the tower's features stay, ``(n,)``: the plans' survivors, and all others."""
        masks = []
        for span, plan in zip(self.spans, plans, strict=True):
            mask = plan.keep_mask
            if not span.plain:
                whole = mask.new_ones(span.size)
                mask = whole.index_copy(0, span.tokens(mask.device), mask)
            masks.append(mask)
        return torch.cat(masks)

    def owners(self, plans: Sequence[FusionPlan]) -> Tensor:
        """Which of the tower's features each was fused into, ``(n,)``; -1 where it was dropped."""
        found, begin = [], 0
        for span, plan in zip(self.spans, plans, strict=True):
            own = torch.arange(begin, begin + span.size, device=plan.target.device)
            places = span.tokens(own.device)
            owner = own[places[plan.survivors]][plan.target.clamp_min(0)]
            owner = torch.where(plan.target == DROPPED, DROPPED, owner)
            found.append(own.index_copy(0, places, owner))
            begin += span.size
        return torch.cat(found)


class _Tower(NamedTuple):
    """What the vision tower made of one modality: ``features (n, D)``, and attention, if heard."""

    modality: Modality
    kind: Modality
    output: Any
    features: Tensor
    spans: list[Span]
    heard: list[Tensor]

    def items(self, texts: Sequence[Tensor] | None) -> list[VisualTokens]:
        """Each item as tokens, without what is none."""
        saliency: Sequence[Tensor | None] = [None] * len(self.spans)
        if self.heard:
            saliency = torch.cat(self.heard).split([span.num_tokens for span in self.spans])
        parts = self.features.split([span.size for span in self.spans])
        return [
            VisualTokens.from_grid(
                part if span.plain else part[span.tokens(part.device)],
                span.grid,
                saliency=salient,
                text=None if texts is None else texts[i],
            )
            for i, (span, part, salient) in enumerate(zip(self.spans, parts, saliency, strict=True))
        ]


class ModelAdapter(ABC):
    """What every adapter has: a name, the models that it fits, and one of them."""

    name: ClassVar[str]
    fallback: ClassVar[bool] = False
    """Whether every other adapter that matches goes before this one."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def matches(cls, model: Any) -> bool:
        """Whether this adapter fits ``model``."""


def takes_features(model: Any) -> bool:
    """Whether ``model`` is a transformers model with a head that takes encoder outputs.

    The base model inside it has the same config, and so has a wrapper such as PEFT's.
    """
    whole = hasattr(type(model), "base_model_prefix") and model.base_model is not model
    return whole and "mm_encoder_outputs" in inspect.signature(model.forward).parameters


class Adapter(ModelAdapter):
    """Hands a transformers model a shorter prompt. Nothing in the model is changed.

    What a subclass leaves out is told from the model's config and the inputs, or refused where they
    do not say it.
    """

    family: ClassVar[tuple[str, ...]] = ()
    """Values of ``config.model_type`` of the models that it fits."""
    supplies: ClassVar[frozenset[Need]] = frozenset({"text"})
    """What it can give a strategy beside features: ``saliency``, ``text``."""

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether the model is of the ``family``, and itself a transformers VLM that generates."""
        kind = getattr(getattr(model, "config", None), "model_type", None)
        return kind in cls.family and takes_features(model)

    def spans(
        self, inputs: Mapping[str, Any], modality: Modality, entries: Sequence[Tensor]
    ) -> list[Span]:
        """Where the tokens of each item are among the tower's features, in prompt order.

        ``entries``: the features ``(n, D)`` of each part of the tower's output: an image, a video,
        or all images of a prompt, as the model has it. By default from ``grid_thw``, or from the
        shape of the pixels and the newlines among the features.

        Raises PromptError where inputs are missing or do not fit, UnsupportedModelError where the
        model gives no way to tell.
        """
        model, pixels = self.model, inputs[PIXELS[modality]]
        vision = model.config.vision_config
        merge, grid = (
            getattr(vision, "spatial_merge_size", None),
            inputs.get(f"{modality}_grid_thw"),
        )
        if grid is not None and merge is not None:
            return [Span((t, h // merge, w // merge)) for t, h, w in grid.tolist()]
        layout.refuse_resamplers(model)
        newline = getattr(model.base_model, "image_newline", None)
        if modality == "video":
            return layout.from_video_pixels(entries, pixels, vision, newline)
        return layout.from_pixels(entries, pixels, vision, newline, inputs.get("image_sizes"))

    def check(self, inputs: Mapping[str, Any], modality: Modality) -> None:
        """Raise PromptError where the tower cannot read the inputs of a modality.

        By default where ``grid_thw`` is missing or does not describe the pixels.
        """
        name, pixels = f"{modality}_grid_thw", PIXELS[modality]
        if name not in inspect.signature(self._encoder(modality)).parameters:
            return
        grid, given = inputs.get(name), len(inputs[pixels])
        if grid is None:
            raise PromptError(
                f"{name} is missing beside the pixels; expected (items, 3): pass all that the "
                "processor returns"
            )
        described = int(grid.prod(-1).sum())
        if described != given:
            raise PromptError(
                f"{pixels} hold {given} patches, {name} describes {described}: pass all that one "
                "processor call returns"
            )

    def position_delta(self) -> Tensor | None:
        """What the model adds to a token count for a rope position, ``(B, 1)``; None in 1-D."""
        delta: Tensor | None = getattr(self.model.base_model, "rope_deltas", None)
        return delta

    def set_position_delta(self, delta: Tensor | None) -> None:
        """Store the delta that decoding and later turns read. Nothing to do for 1-D rope."""
        if hasattr(self.model.base_model, "rope_deltas"):
            self.model.base_model.rope_deltas = delta

    def has_visuals(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the inputs bring pixels."""
        return any(inputs.get(name) is not None for name in PIXELS.values())

    def encoder_inputs(self, inputs: Mapping[str, Any], modality: Modality) -> dict[str, Any]:
        """The inputs that the vision tower reads for a modality."""
        known = inspect.signature(self._encoder(modality)).parameters
        return {k: inputs[k] for k in known if k != "kwargs" and inputs.get(k) is not None}

    def encode(
        self,
        inputs: Mapping[str, Any],
        needs: Mapping[Modality, Needs] | None = None,
        frames_as_images: bool = False,
        since: Sequence[int] = (),
    ) -> list[Encoded]:
        """Run the vision tower once per modality and return every item as ``VisualTokens``.

        ``needs`` says which saliency and whether the prompt's text come with images and videos;
        ``frames_as_images`` whether the images of a prompt are the frames of one video, and of
        another from each of the columns ``since`` on.

        Raises PromptError where features and inputs do not agree, TokensError on NaN or Inf (one
        host synchronisation per item), ConfigError where the model has no such vision block,
        UnsupportedModelError where the features' places cannot be told.
        """
        needs = needs or {}
        found: list[_Tower] = []
        for modality in MODALITIES:
            if inputs.get(PIXELS[modality]) is None:
                continue
            self.check(inputs, modality)
            frames = modality == "image" and frames_as_images
            kind: Modality = "video" if frames else modality
            attention = needs.get(kind, Needs()).attention
            with self.listen(attention, inputs, modality) as heard:
                output = self._encode(inputs, modality)
            if attention and not heard:
                raise UnsupportedModelError(
                    f"vision block {attention.block} of {type(self.model).__name__} did not run, "
                    "so that its attention cannot be read: choose another block"
                )
            entries = [flat([entry]) for entry in output.pooler_output]
            features = flat(entries)
            spans = self.spans(inputs, modality, entries)
            layout.check_spans(spans, len(features), modality)
            if frames:
                places = self.places(inputs, modality, spans)
                videos = [(row, sum(at >= begins for begins in since)) for row, at in places]
                spans = layout.as_frames(spans, videos)
            found.append(_Tower(modality, kind, output, features, spans, heard))
        asked = [tower for tower in found if needs.get(tower.kind, Needs()).text]
        texts = self._texts(inputs, found) if asked else {}
        return [
            Encoded(x.modality, x.output, x.items(texts.get(x.modality)), x.kind, x.spans)
            for x in found
        ]

    def listen(
        self, attention: Attention | None, inputs: Mapping[str, Any], modality: Modality
    ) -> AbstractContextManager[list[Tensor]]:
        """Collect the saliency ``(N,)`` of every call of the vision tower inside the block.

        ``inputs`` and ``modality`` are what the tower is about to read.

        An adapter that supplies saliency overrides this, with ``supply.listen``.
        """
        return nullcontext([])

    def _encoder(self, modality: Modality) -> Callable[..., Any]:
        method: Callable[..., Any] | None = getattr(
            self.model.base_model, f"get_{modality}_features", None
        )
        if method is None:
            raise PromptError(
                f"{PIXELS[modality]} are given, and {type(self.model).__name__} reads no {modality}"
                f"s; expected {PIXELS['image' if modality == 'video' else 'video']}"
            )
        return method

    def _encode(self, inputs: Mapping[str, Any], modality: Modality) -> Any:
        output = self._encoder(modality)(**self.encoder_inputs(inputs, modality), return_dict=True)
        named = dataclasses.fields(output) if dataclasses.is_dataclass(output) else ()
        fields = {f.name for f in named if getattr(output, f.name) is not None}
        if "pooler_output" not in fields or fields - READ:
            found = ", ".join(sorted(fields)) or type(output).__name__
            raise UnsupportedModelError(
                f"get_{modality}_features of {type(self.model).__name__} returns {found}; expected "
                "pooler_output, and beside it no more than "
                f"{', '.join(sorted(READ - {'pooler_output'}))}: write an adapter for this model"
            )
        return output

    def places(
        self, inputs: Mapping[str, Any], modality: Modality, spans: Sequence[Span]
    ) -> list[tuple[int, int]]:
        """The prompt of the batch and the column at which each span begins. One host sync.

        Raises PromptError where placeholders and features do not agree.
        """
        here = self.placeholders(inputs, modality).nonzero()
        starts = list(itertools.accumulate((span.size for span in spans), initial=0))
        if len(here) != starts[-1]:
            raise mismatch(modality, len(here), starts[-1])
        return [(row, column) for row, column in here[starts[:-1]].tolist()]

    def _texts(
        self, inputs: Mapping[str, Any], found: Sequence[_Tower]
    ) -> dict[Modality, list[Tensor]]:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        text = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        config = self.model.config
        markers = ("vision_start_token_id", "vision_end_token_id")
        for token in (getattr(config, name, None) for name in markers):
            if token is not None:
                text = text & (ids != token)
        here = {modality: self.placeholders(inputs, modality) for modality in MODALITIES}
        for places in here.values():
            text = text & ~places
        sizes = {x.modality: [span.size for span in x.spans] for x in found}
        shown = {modality: here[modality] for modality in sizes}
        return prompt_texts(self.model.get_input_embeddings(), ids, text, shown, sizes)

    def fuse(
        self,
        encoded: Encoded,
        plans: Sequence[FusionPlan],
        fuse: Fuse,
        only: Sequence[int] | None = None,
    ) -> Any:
        """The vision tower's output after the plans, DeepStack layers too, in its own class.

        ``fuse`` is the strategy's, which applies one plan to the features of one item. ``only``:
        the items that are needed, all if None.
        """

        def fused(features: Any) -> Any:
            if only is None and all(plan.is_identity for plan in plans):
                return features
            parts = flat(features).split([span.size for span in encoded.spans])
            chosen = range(len(plans)) if only is None else only
            short = [_apply(fuse, plans[i], encoded.spans[i], parts[i]) for i in chosen]
            if isinstance(features, Tensor):
                # One token per row: generate repeats rows, and tells prompts apart by their count.
                return torch.cat(short)[:, None]
            return type(features)(short)

        fields: dict[str, Any] = {"pooler_output": fused(encoded.output.pooler_output)}
        layers = getattr(encoded.output, "deepstack_features", None)
        if layers is not None:
            if any(not isinstance(x, Tensor) for layer in layers for x in layer):
                raise UnsupportedModelError(
                    f"deepstack_features of {type(self.model).__name__} are of a form that "
                    "tokenfuse does not know; expected tensors for every layer: write an adapter"
                )
            fields["deepstack_features"] = [fused(layer) for layer in layers]
        return type(encoded.output)(**fields)

    def placeholder_id(self, modality: Modality) -> int | None:
        """The token id that stands for one visual token of a modality, None where there is none."""
        config = self.model.config
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            token: int | None = getattr(config, name, None)
            if token is not None:
                return token
        return None

    def placeholders(self, inputs: Mapping[str, Any], modality: Modality) -> Tensor:
        """Which prompt tokens stand for a feature of a modality, ``(B, L)``.

        One that the attention mask hides is not shown to the model.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        token = self.placeholder_id(modality)
        if token is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        here: Tensor = ids == token
        return here if mask is None else here & (mask != 0)

    def kept_columns(
        self, inputs: Mapping[str, Any], encoded: Sequence[Encoded], plans: Plans
    ) -> Tensor:
        """Which prompt tokens survive, ``(B, L)``: all text, and the plans' visual tokens.

        Raises PromptError where a modality's placeholders are not as many as its features.
        """
        keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        for modality in MODALITIES:
            here = self.placeholders(inputs, modality)
            masks = [x.keep_mask(plans[modality]) for x in encoded if x.modality == modality]
            mask = masks[0].to(keep.device) if masks else keep.new_ones(0)
            found = int(here.sum())
            if found != len(mask):
                raise mismatch(modality, found, len(mask))
            keep = keep.masked_scatter(here, mask)
        return keep

    def owners(self, inputs: Mapping[str, Any], encoded: Sequence[Encoded], plans: Plans) -> Tensor:
        """The column of the token that each of a prompt was fused into, ``(B, L)``; -1 if none."""
        ids = inputs["input_ids"]
        own = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        owners = own
        for part in encoded:
            here = self.placeholders(inputs, part.modality)
            features = part.owners(plans[part.modality]).to(own)
            # The column of each feature, found without a mask's host synchronisation.
            place = torch.where(here, here.flatten().cumsum(0).view_as(ids) - 1, len(features))
            columns = own.new_empty(len(features) + 1)
            columns = columns.scatter(0, place.flatten(), own.flatten())[:-1]
            owner = torch.where(features == DROPPED, DROPPED, columns[features.clamp_min(0)])
            owners = owners.masked_scatter(here, owner)
        return owners

    def seen_from(self, inputs: Mapping[str, Any]) -> Tensor:
        """The first column of a prompt that sees each of its tokens, ``(B, L)``.

        Itself, where each token sees those before it. Models that know ``token_type_ids`` let
        tokens of one type that follow each other see each other. Override it for others in which
        visual tokens see what comes after them.
        """
        ids, types = inputs["input_ids"], inputs.get("token_type_ids")
        own = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        known = inspect.signature(type(self.model).forward).parameters
        if types is None or "token_type_ids" not in known:
            return own
        starts = torch.cat([torch.ones_like(types[:, :1]), types.diff()], -1) != 0
        return torch.where(starts, own, 0).cummax(-1).values

    def positions(self, inputs: Mapping[str, Any]) -> Tensor:
        """Rope positions of the uncompressed prompt, the caller's or by the model's own method."""
        multi = hasattr(self.model.base_model, "rope_deltas")
        given: Tensor | None = inputs.get("position_ids")
        if given is None:
            if multi and self.has_visuals(inputs) and inputs.get("mm_token_type_ids") is None:
                raise PromptError(
                    "mm_token_type_ids is missing, without which the model counts visual tokens as "
                    "text; expected (B, L): pass all that the processor returns"
                )
            method: Callable[..., Tensor] = self.model._prepare_position_ids_for_generation
            given = method(inputs["input_ids"], dict(inputs))
        return given.expand(4, *given.shape) if multi and given.ndim == 2 else given

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
        keep = self.kept_columns(inputs, encoded, plans)
        refuse_lost_end(mask, keep)
        own = inputs.get("position_ids") is None and policy == "keep"
        positions = self.positions({**inputs, "attention_mask": mask})
        delta = self.position_delta() if own else None
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
        # The model's own delta knows of the highest position, which the plan may have removed.
        after = next_position_delta(realigned, new.valid)
        self.set_position_delta(after if delta is None else delta + new.removed[:, None])
        return short, new

    def infer_mask(self, ids: Tensor) -> Tensor:
        """The mask of ids ``(B, n)`` that come without one: as ``generate`` infers it.

        Padding is hidden, unless it is what ends an answer, too.
        """
        pad, ends = self.pad_id(), getattr(self.model.generation_config, "eos_token_id", None)
        if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
            return torch.ones_like(ids)
        return (ids != pad).to(ids.dtype)

    def pad_id(self) -> int | None:
        """The padding token of the model, None where it names none."""
        model = self.model
        for config in (model.generation_config, model.config, model.config.get_text_config()):
            pad: int | None = getattr(config, "pad_token_id", None)
            if pad is not None:
                return pad
        return None


def refuse_lost_end(mask: Tensor, keep: Tensor) -> None:
    """Raise PromptError where a prompt's last token, ``(B, L)``, is not kept. One host sync."""
    last = mask.long().cumsum(-1).argmax(-1, keepdim=True)
    if not bool(keep.gather(-1, last).all()):
        raise PromptError(
            "a prompt ends with a visual token, and the plan removes it; expected text after the "
            "last image or video: let the processor end the prompt"
        )


def _apply(fuse: Fuse, plan: FusionPlan, span: Span, part: Tensor) -> Tensor:
    """The features ``part`` of a span after the plan for its tokens; all others stay."""
    if span.plain:
        return fuse(plan, part)
    tokens = span.tokens(part.device)
    survivors = tokens[plan.survivors]
    fused = fuse(plan, part[tokens]).to(part.dtype)
    stay = torch.cat([survivors, span.others(part.device)]).sort().values
    return part.index_copy(0, survivors, fused)[stay]
