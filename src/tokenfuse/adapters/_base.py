"""What every adapter does for its model family.

A subclass says which models it fits and what is particular to them; everything that is the same for
all transformers VLMs whose ``forward`` takes ``mm_encoder_outputs`` is here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tokenfuse.adapters import _spans as layout
from tokenfuse.adapters._saliency import QueriesKeys, listen
from tokenfuse.adapters._spans import Span, flat
from tokenfuse.adapters._tower import TowerCosts, TowerStage
from tokenfuse.errors import PromptError, UnsupportedModelError
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.prompt.cache import CACHES
from tokenfuse.prompt.frames import Reordered, chunk_bounds, column_order
from tokenfuse.prompt.inputs import MODALITIES, PIXELS, Prompt
from tokenfuse.prompt.realign import Positions
from tokenfuse.prompt.text import Place, mismatch, prompt_texts
from tokenfuse.prompt.turn import Turn
from tokenfuse.strategies._base import Attention, Need, Needs, Strategy
from tokenfuse.strategies._tower import PixelTokens
from tokenfuse.tokens import Modality, VisualTokens

Fuse = Callable[[FusionPlan, Tensor], Tensor]
"""Applies a plan to features ``(N, D)``: ``(M, D)``."""

READ = {"last_hidden_state", "pooler_output", "hidden_states", "attentions", "deepstack_features"}
"""Fields of a vision tower's output; of these, models read the pooled and the DeepStack ones."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """The vision tower's output for the items of one modality, and the items as tokens.

    ``kind``: what the items are; an image-only model's images may be the frames of videos.
    ``spans``: where the tokens of each item are among the tower's features. ``places``: where
    each item begins and ends in the prompt. ``again``: how many items the tower has read that an
    earlier turn had read already; they are not among the others. ``cut``: for each item, what has
    become of its tokens before and inside the tower; what is left is in ``items``. None for all.
    ``costs``: what the tower has read then.
    """

    modality: Modality
    output: Any
    items: list[VisualTokens]
    kind: Modality
    spans: list[Span]
    places: list[tuple[Place, Place]]
    again: int = 0
    cut: list[FusionPlan] | None = None
    costs: TowerCosts | None = None

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

    def frame_columns(self, index: int, columns: Sequence[int]) -> list[tuple[int, int]]:
        """The first column of each frame of an item, and the one behind its last.

        ``columns``: those of all features of the item, in order.
        """
        span = self.spans[index]
        starts = range(span.head, span.size - span.tail, span.frame_size)
        return [(columns[i], columns[i + span.frame_size - 1] + 1) for i in starts]

    def owners(self, plans: Sequence[FusionPlan]) -> Tensor:
        """The index of the feature that each was fused into, ``(n,)``; -1 where it was dropped."""
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
    """What the vision tower made of one modality: ``features (n, D)``, and ``saliency (N,)``.

    ``places``: where each span begins and ends in the prompt. ``again``: how many spans were left
    out because an earlier turn has read them. ``cut``, ``costs``: as in Encoded, for each span.
    """

    modality: Modality
    kind: Modality
    output: Any
    features: Tensor
    spans: list[Span]
    saliency: Tensor | None
    places: list[tuple[Place, Place]]
    again: int = 0
    cut: list[FusionPlan] | None = None
    costs: TowerCosts | None = None

    def since(self, column: int) -> _Tower:
        """The same without what stands before a column."""
        new = [i for i, ((_, first), _) in enumerate(self.places) if first >= column]
        sizes = [span.size for span in self.spans]

        def chosen(features: Any) -> Any:
            parts = flat(features).split(sizes)
            if isinstance(features, Tensor):
                return torch.cat([self.features[:0], *(parts[i] for i in new)])[:, None]
            return type(features)(parts[i] for i in new)

        output = _map_features(self.output, chosen)
        saliency = self.saliency
        if saliency is not None:
            parts = saliency.split([span.num_tokens for span in self.spans])
            saliency = torch.cat([saliency[:0], *(parts[i] for i in new)])
        return self._replace(
            output=output,
            features=flat(output.pooler_output) if new else self.features[:0],
            spans=[self.spans[i] for i in new],
            saliency=saliency,
            places=[self.places[i] for i in new],
            again=len(self.spans) - len(new),
            cut=None if self.cut is None else [self.cut[i] for i in new],
            costs=None if self.costs is None else self.costs.of(new),
        )

    def as_frames(self) -> _Tower:
        """The images of each prompt as the frames of one video."""
        rows = [row for (row, _), _ in self.places]
        whole: dict[int, tuple[Place, Place]] = {}
        for row, (first, last) in zip(rows, self.places, strict=True):
            whole[row] = (whole[row][0] if row in whole else first, last)
        return self._replace(spans=layout.as_frames(self.spans, rows), places=list(whole.values()))

    def items(self, texts: Mapping[int, Tensor]) -> list[VisualTokens]:
        """Each item as tokens, without the features that are no visual tokens.

        ``texts``: the embedded text of each prompt of the batch, where it is wanted.
        """
        saliency: Sequence[Tensor | None] = [None] * len(self.spans)
        if self.saliency is not None:
            saliency = self.saliency.split([span.num_tokens for span in self.spans])
        parts = self.features.split([span.size for span in self.spans])
        whole = [
            VisualTokens.from_grid(
                part if span.plain else part[span.tokens(part.device)],
                span.grid,
                saliency=salient,
                text=texts.get(row),
            )
            for ((row, _), _), span, part, salient in zip(
                self.places, self.spans, parts, saliency, strict=True
            )
        ]
        if self.cut is None:
            return whole
        return [
            tokens.after(plan.survivors, plan.fuse(tokens.features))
            for tokens, plan in zip(whole, self.cut, strict=True)
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


def parameters_of(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names that a model's method takes."""
    function = getattr(method, "__func__", None)
    # What an instance holds itself, such as a wrapper, may hold the model in turn.
    return _names_of(method) if function is None else _parameters_of(function)


@functools.cache
def _parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    # A class's function is the same for all its models, and is looked up often.
    return _names_of(function)


def _names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def takes_features(model: Any) -> bool:
    """Whether ``model`` is a transformers model with a head that takes encoder outputs.

    The base model inside it has the same config, and so has a wrapper such as PEFT's.
    """
    try:
        whole = hasattr(type(model), "base_model_prefix") and model.base_model is not model
        return whole and "mm_encoder_outputs" in parameters_of(model.forward)
    except (AttributeError, TypeError, ValueError):
        return False  # Something else that only looks like a transformers model.


class Adapter(ModelAdapter):
    """Hands a transformers model a shorter prompt. Nothing in the model is changed.

    What a subclass leaves out is told from the model's config and the inputs, or refused where they
    do not say it.
    """

    family: ClassVar[tuple[str, ...]] = ()
    """Values of ``config.model_type`` of the models that the adapter fits."""
    towers: ClassVar[tuple[str, ...]] = ()
    """Values of ``config.vision_config.model_type`` that the adapter fits; any tower if empty."""

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether the model is of the ``family``, with one of the ``towers``, and generates.

        Never raises, whatever ``model`` is.
        """
        config = getattr(model, "config", None)
        vision = getattr(config, "vision_config", None)
        return (
            getattr(config, "model_type", None) in cls.family
            and (not cls.towers or getattr(vision, "model_type", None) in cls.towers)
            and takes_features(model)
        )

    @property
    def supplies(self) -> frozenset[Need]:
        """What a strategy can get beside features: ``text``, and ``saliency`` by queries_keys."""
        if type(self).queries_keys is Adapter.queries_keys:
            return frozenset({"text"})
        return frozenset({"saliency", "text"})

    def attention_modules(self, modality: Modality) -> Sequence[nn.Module]:
        """The attention of each block of the tower that reads a modality, the first block first.

        By default none: the adapter supplies no saliency.
        """
        return ()

    def queries_keys(self, module: Any, modality: Modality, **call: Any) -> QueriesKeys:
        """Queries and keys of one call of one of the ``attention_modules``.

        ``call``: what the module is called with, by name. An adapter that overrides this supplies
        saliency. Raises UnsupportedModelError where queries and keys do not tell the attention.
        """
        raise NotImplementedError

    def arrange_saliency(
        self, saliency: Tensor, block: int, inputs: Mapping[str, Any], modality: Modality
    ) -> Tensor:
        """The saliency ``(N,)`` of all tokens of a modality, in the order of the items.

        ``saliency (n,)``: that of each group of patches in one vision ``block``, in the tower's
        order. By default each group is a token, and the order is that of the items.
        """
        return saliency

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

    @property
    def cuts_tower(self) -> Literal["tokens", "frames"] | None:
        """What the vision tower can leave out: visual tokens, or whole frames of a video only.

        None for neither.
        """
        return None

    def tower_stage(
        self, inputs: Mapping[str, Any], modality: Modality, strategy: Strategy
    ) -> TowerStage:
        """What a strategy does before and inside the tower for the items of a modality.

        For adapters that say by ``cuts_tower`` what their tower can leave out.
        """
        raise NotImplementedError

    def pixels(self, inputs: Mapping[str, Any], modality: Modality) -> list[PixelTokens]:
        """The items of a modality as the tower is about to read them, in prompt order.

        For adapters whose tower can leave out ``"tokens"``.
        """
        raise NotImplementedError

    @property
    def tower_blocks(self) -> Sequence[nn.Module]:
        """The blocks of a tower that can leave something out, the first one first."""
        raise NotImplementedError

    def check(self, prompt: Prompt, modality: Modality) -> None:
        """Raise PromptError where the tower cannot read the inputs of a modality.

        By default where ``grid_thw`` is missing or does not describe the pixels.
        """
        inputs, name, pixels = prompt.inputs, f"{modality}_grid_thw", PIXELS[modality]
        if name not in parameters_of(self._encoder(modality)):
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

    def encoder_inputs(self, inputs: Mapping[str, Any], modality: Modality) -> dict[str, Any]:
        """The inputs that the vision tower reads for a modality."""
        known = parameters_of(self._encoder(modality))
        return {k: inputs[k] for k in known if k != "kwargs" and inputs.get(k) is not None}

    def read(self, inputs: Mapping[str, Any], *, continues: bool = False) -> Prompt:
        """The prompt that the caller's inputs hold; see ``Prompt.read``."""
        if isinstance(inputs, Mapping):
            for modality in MODALITIES:
                if inputs.get(PIXELS[modality]) is not None:
                    self._encoder(modality)
        return Prompt.read(inputs, self.placeholders, self.pad_id(), continues=continues)

    def encode(
        self,
        prompt: Prompt,
        needs: Mapping[Modality, Needs] | None = None,
        frames_as_images: bool = False,
        after: Turn | None = None,
        strategy: Strategy | None = None,
    ) -> list[Encoded]:
        """Run the vision tower once per modality and return every item as ``VisualTokens``.

        ``needs`` says which saliency and whether the prompt's text come with images and videos;
        ``frames_as_images`` whether the images of a prompt are the frames of one video. ``after``:
        what a cache has read of the prompt. Its items are not returned, nor encoded where the
        inputs say which pixels are theirs. ``strategy``: what acts before or inside the tower.

        Raises PromptError where features and inputs do not agree, TokensError on NaN or Inf (one
        host synchronisation per item), ConfigError where the model has no such vision block,
        UnsupportedModelError where the features' places cannot be told.
        """
        needs, since = needs or {}, 0 if after is None else after.length
        towers = [
            tower
            for modality in prompt.shows
            if (
                tower := self._tower(prompt, modality, needs, frames_as_images, since, strategy)
            ).spans
        ]
        texts: dict[int, Tensor] = {}
        if any(needs.get(tower.kind, Needs()).text for tower in towers):
            texts = self._texts(prompt, towers, after)
        return [
            Encoded(
                x.modality,
                x.output,
                x.items(texts),
                x.kind,
                x.spans,
                x.places,
                x.again,
                x.cut,
                x.costs,
            )
            for x in towers
        ]

    def _tower(
        self,
        prompt: Prompt,
        modality: Modality,
        needs: Mapping[Modality, Needs],
        frames_as_images: bool,
        since: int,
        strategy: Strategy | None,
    ) -> _Tower:
        """What the vision tower makes of the items of a modality from column ``since`` on."""
        self.check(prompt, modality)
        frames = modality == "image" and frames_as_images
        kind: Modality = "video" if frames else modality
        inputs, counts = prompt.inputs, None
        if since:
            counts = self.feature_counts(prompt, modality)
        if counts is not None:
            places = prompt.places(modality, counts)
            new = [i for i, ((_, column), _) in enumerate(places) if column >= since]
            if not new:
                return _Tower(modality, kind, None, prompt.ids.new_empty(0, 0), [], None, [])
            inputs = {**inputs, **self.pixels_of(inputs, modality, new)}
        attention = needs.get(kind, Needs()).attention
        stage: TowerStage | None = None
        running: AbstractContextManager[None] = nullcontext()
        if strategy is not None and (self.cuts_tower == "tokens" or modality == "video"):
            stage = self.tower_stage(inputs, modality, strategy)
            if strategy.acts_before_tower:
                stage.before(self.pixels(inputs, modality))
            running = stage.running()
        with self.listen(attention, modality) as heard, running:
            output = self._encode(inputs, modality)
        saliency = None
        if attention is not None:
            if stage is not None:
                block = attention.block % len(stage.blocks)
                heard = [stage.spread(torch.cat(list(heard)), block)]
            saliency = self._saliency(heard, attention.block, inputs, modality)
        entries = [flat([entry]) for entry in output.pooler_output]
        features = flat(entries)
        if counts is not None and len(features) != sum(counts[i] for i in new):
            raise mismatch(modality, sum(counts[i] for i in new), len(features))
        spans = self.spans(inputs, modality, entries)
        layout.check_spans(spans, len(features), modality)
        sizes = [span.size for span in spans]
        places = prompt.places(modality, sizes, since if counts is not None else 0)
        cut = None if stage is None else stage.finish([span.grid for span in spans])
        costs = None if stage is None else stage.costs()
        tower = _Tower(modality, kind, output, features, spans, saliency, places, 0, cut, costs)
        if since and counts is None:
            tower = tower.since(since)
        return tower.as_frames() if frames else tower

    def listen(
        self, attention: Attention | None, modality: Modality
    ) -> AbstractContextManager[list[Tensor]]:
        """Collect the saliency of each call of the chosen vision block that this thread makes.

        Raises ConfigError where the tower has no such block, UnsupportedModelError where the
        adapter supplies no saliency.
        """
        if attention is None:
            return nullcontext([])
        if "saliency" not in self.supplies:
            raise UnsupportedModelError(
                f"adapter {self.name} supplies no saliency: choose a strategy that needs features "
                "only"
            )

        def queries_keys(module: nn.Module, **call: Any) -> QueriesKeys:
            return self.queries_keys(module, modality, **call)

        return listen(self.attention_modules(modality), attention, queries_keys)

    def _saliency(
        self, heard: Sequence[Tensor], block: int, inputs: Mapping[str, Any], modality: Modality
    ) -> Tensor:
        if not heard:
            raise UnsupportedModelError(
                f"vision block {block} of {type(self.model).__name__} did not run, so that its "
                "attention cannot be read: choose another block"
            )
        return self.arrange_saliency(torch.cat(list(heard)), block, inputs, modality)

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

    def feature_counts(self, prompt: Prompt, modality: Modality) -> list[int] | None:
        """How many features each pixel entry of a modality has, told before any is encoded.

        None where the inputs do not say which pixels belong to which entry. By default from
        ``grid_thw``, or where every image, tile or video is one entry of a tensor of pixels.
        """
        inputs, pixels = prompt.inputs, prompt.inputs[PIXELS[modality]]
        name = f"{modality}_grid_thw"
        read, grid = self.encoder_inputs(inputs, modality).keys(), inputs.get(name)
        merge = getattr(self.model.config.vision_config, "spatial_merge_size", None)
        if grid is not None and merge is not None:
            return (
                (grid.prod(-1) // merge**2).tolist() if read <= {PIXELS[modality], name} else None
            )
        alone = read <= {PIXELS[modality]} and isinstance(pixels, Tensor)
        if not alone or pixels.ndim != (4 if modality == "image" else 5) or not len(pixels):
            return None
        # Entries of one shape have equally many features.
        count, rest = divmod(int(prompt.here[modality].sum()), len(pixels))
        return None if rest else [count] * len(pixels)

    def pixels_of(
        self, inputs: Mapping[str, Any], modality: Modality, chosen: Sequence[int]
    ) -> dict[str, Any]:
        """The inputs of the vision tower for some of the entries of ``feature_counts``."""
        read = self.encoder_inputs(inputs, modality)
        name, grid = PIXELS[modality], read.get(f"{modality}_grid_thw")
        if grid is None:
            return {key: value[list(chosen)] for key, value in read.items()}
        parts = read[name].split(grid.prod(-1).tolist())
        return {
            name: torch.cat([parts[i] for i in chosen]),
            f"{modality}_grid_thw": grid[list(chosen)],
        }

    def _texts(
        self, prompt: Prompt, towers: Sequence[_Tower], after: Turn | None
    ) -> dict[int, Tensor]:
        """The embedded text of every prompt that shows something new, by its row."""
        text = prompt.mask.bool()
        config = self.model.config
        for name in ("vision_start_token_id", "vision_end_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                text = text & (prompt.ids != token)
        for here in prompt.here.values():
            text = text & ~here
        new = [place for tower in towers for place in tower.places]
        old = () if after is None else ((item.first, item.last) for item in after.items)
        rows = sorted({row for (row, _), _ in new})
        return prompt_texts(self.model.get_input_embeddings(), prompt.ids, text, [*new, *old], rows)

    def frame_bounds(self, ids: Sequence[int], frames: Sequence[tuple[int, int]]) -> list[int]:
        """Where the part of a prompt that goes with each frame begins, and the last one ends.

        ``ids``: those of the prompt. ``frames``: the first column of each frame's tokens and the
        one behind its last. By default text between two frames goes with the later one, but for
        the markers that follow every frame.

        Raises PromptError where the text before the first frame is not like that before others.
        """
        return chunk_bounds(ids, frames)

    def column_order(
        self,
        prompt: Prompt,
        encoded: Sequence[Encoded],
        plans: Mapping[Modality, Sequence[FusionPlan]],
    ) -> Tensor | None:
        """The caller's column that stands in each place of the prompt, ``(B, L)``.

        None where no plan has a ``frame_order``; otherwise a few host synchronisations: the ids,
        the placeholders of each modality, and each order.
        """
        moves, ids = [], None
        for part in encoded:
            own, here = plans[part.modality], None
            for i, (((row, first), (_, last)), plan) in enumerate(
                zip(part.places, own, strict=True)
            ):
                if plan.frame_order is None:
                    continue
                ids = prompt.ids.tolist() if ids is None else ids
                here = prompt.here[part.modality].tolist() if here is None else here
                columns = [c for c in range(first, last + 1) if here[row][c]]
                bounds = self.frame_bounds(ids[row], part.frame_columns(i, columns))
                moves.append(Reordered(row, bounds, plan.frame_order.tolist()))
        if not moves:
            return None
        rows, length = prompt.ids.shape
        return column_order((rows, length), moves).to(prompt.ids.device)

    def fuse(self, encoded: Encoded, plans: Sequence[FusionPlan], fuse: Fuse) -> Any:
        """The vision tower's output after the plans, DeepStack layers too, in its own class.

        ``fuse`` is the strategy's, which applies one plan to the features of one item. The frames
        of an item come in the order that its plan says.
        """
        sizes = [span.size for span in encoded.spans]

        def fused(features: Any) -> Any:
            if all(plan.is_identity for plan in plans):
                return features
            parts = flat(features).split(sizes)
            short = [
                _apply(fuse, plan, span, part)
                for plan, span, part in zip(plans, encoded.spans, parts, strict=True)
            ]
            if isinstance(features, Tensor):
                # One token per row: generate repeats rows, and tells prompts apart by their count.
                return torch.cat(short)[:, None]
            return type(features)(short)

        return _map_features(encoded.output, fused)

    def placeholder_id(self, modality: Modality) -> int | None:
        """The token id that stands for one visual token of a modality, None where there is none."""
        config = self.model.config
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            token: int | None = getattr(config, name, None)
            if token is not None:
                return token
        return None

    def placeholders(self, inputs: Mapping[str, Any], modality: Modality) -> Tensor:
        """Which tokens of the prompt stand for a feature of a modality, ``(B, L)``.

        The prompt leaves out those that the attention mask hides: the model is not shown them.
        """
        ids, token = inputs["input_ids"], self.placeholder_id(modality)
        if token is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        here: Tensor = ids == token
        return here

    def seen_from(self, prompt: Prompt) -> Tensor:
        """The first column of a prompt that sees each of its tokens, ``(B, L)``.

        Itself, where each token sees those before it. Models that know ``token_type_ids`` let
        tokens of one type that follow each other see each other. Override it for others in which
        visual tokens see what comes after them.
        """
        ids, types = prompt.ids, prompt.per_token.get("token_type_ids")
        own = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        known = parameters_of(type(self.model).forward)
        if types is None or "token_type_ids" not in known:
            return own
        starts = torch.cat([torch.ones_like(types[:, :1]), types.diff()], -1) != 0
        return torch.where(starts, own, 0).cummax(-1).values

    def positions(self, prompt: Prompt) -> Positions:
        """Rope positions of the uncompressed prompt, the caller's or by the model's own method.

        The model stays as it is.

        Raises PromptError where inputs are missing that the model counts by.
        """
        multi = self._counts_by_delta
        given: Tensor | None = prompt.inputs.get("position_ids")
        delta: Tensor | None = None
        if given is None:
            if multi and prompt.shows and "mm_token_type_ids" not in prompt.per_token:
                raise PromptError(
                    "mm_token_type_ids is missing, without which the model counts visual tokens as "
                    "text; expected (B, L): pass all that the processor returns"
                )
            # The model's method stores a delta in the model.
            model = _apart(self.model) if multi else self.model
            values = {name: x for name, x in prompt.inputs.items() if name not in CACHES}
            values["attention_mask"] = prompt.mask
            given = model._prepare_position_ids_for_generation(prompt.ids, values)
            delta = getattr(model.base_model, "rope_deltas", None)
        if multi and given.ndim == 2:
            given = given.expand(4, *given.shape)
        return Positions(given.expand(*given.shape[:-2], len(prompt.ids), -1), delta)

    @property
    def _counts_by_delta(self) -> bool:
        return hasattr(self.model.base_model, "rope_deltas")

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


def _apart(model: Any) -> Any:
    """The model on an object of its own, as its base model is, so that both keep what is set."""
    apart, base = _twin(model), _twin(model.base_model)
    apart._modules = {**model._modules, model.base_model_prefix: base}
    return apart


def _twin(module: Any) -> Any:
    """Another object with the attributes of a module; ``copy.copy`` takes ten times as long."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    return twin


def _map_features(output: Any, change: Callable[[Any], Any]) -> Any:
    """The output of a vision tower, in its own class, with its features changed layer by layer."""
    fields: dict[str, Any] = {"pooler_output": change(output.pooler_output)}
    layers = getattr(output, "deepstack_features", None)
    if layers is not None:
        if any(not isinstance(x, Tensor) for layer in layers for x in layer):
            raise UnsupportedModelError(
                f"deepstack_features of a {type(output).__name__} are of a form that tokenfuse "
                "does not know; expected tensors for every layer: write an adapter"
            )
        fields["deepstack_features"] = [change(layer) for layer in layers]
    return type(output)(**fields)


def _apply(fuse: Fuse, plan: FusionPlan, span: Span, part: Tensor) -> Tensor:
    """The features ``part`` of a span after the plan for its tokens; all others stay."""
    if span.plain:
        fused = fuse(plan, part)
        if plan.frame_order is None:
            return fused
        return fused.index_select(0, plan.prompt_order(plan.survivors // prod(span.grid[1:])))
    tokens = span.tokens(part.device)
    survivors = tokens[plan.survivors]
    fused = fuse(plan, part.index_select(0, tokens)).to(part.dtype)
    stay = torch.cat([survivors, span.others(part.device)])
    if plan.frame_order is None:
        stay = stay.sort().values
    else:
        place = span.in_order(plan.frame_order).argsort()
        stay = stay[place[stay].argsort()]
    return part.index_copy(0, survivors, fused)[stay]
