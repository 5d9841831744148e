"""The road of every prompt: read, encode, plan, fuse, shorten, report.

First and later turns take it alike, whatever calls it: ``compress``, a session, a benchmark.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenfuse.adapters._base import Adapter, Encoded
from tokenfuse.adapters._tower import TowerCosts, tower_cuts
from tokenfuse.config import Configuration, StrategyLike, get_configuration
from tokenfuse.costs import (
    Stopwatch,
    attends,
    kv_cache_bytes,
    layered_kv_cache_bytes,
    layered_prefill_flops,
    prefill_flops,
    versions,
)
from tokenfuse.errors import ConfigError, PlanError, PromptError, UnsupportedModelError
from tokenfuse.plan import FusionPlan
from tokenfuse.prompt.cache import cache_of
from tokenfuse.prompt.inputs import MODALITIES, PIXELS, Prompt
from tokenfuse.prompt.layers import Kept, Layers, Visuals
from tokenfuse.prompt.realign import PaddingSide
from tokenfuse.prompt.shares import Shares
from tokenfuse.prompt.turn import Item, Shortened, Turn, in_prompt_order, shorten_prompt
from tokenfuse.registry import Registry, default_registry
from tokenfuse.report import ItemReport, Report
from tokenfuse.strategies._base import Needs, Strategy
from tokenfuse.strategies._parts import silent
from tokenfuse.strategies._tower import TowerPlan
from tokenfuse.tokens import Grid, Modality, VisualTokens, all_finite, grid_coords

# Reading the metadata of packages takes milliseconds.
_versions = functools.cache(versions)

TAKES_A_BIAS = ("sdpa", "eager")
"""Attention implementations of transformers that add a mask of floats to their logits."""


class Observe(Protocol):
    """A callable that is told of each plan and each report.

    ``hook``: which of the observing hooks it is. ``arguments``: those of the hook.
    """

    def __call__(self, hook: str, /, **arguments: Any) -> None: ...


def _nobody(hook: str, /, **arguments: Any) -> None:
    """An observer that does nothing."""


class CompressedInputs(dict[str, Any]):
    """Keyword arguments for ``model.generate`` or ``model(...)``.

    ``report``: what compression did. ``columns (B, L')``: the column of the caller's prompt that
    each token comes from. ``turn``: the shorter prompt, as a cache that has read it holds it; None
    where the prompt is text and stays as it is. Copies and pickles keep all three; ``{**short}`` is
    a plain dict of the arguments alone.
    """

    def __init__(
        self, arguments: Mapping[str, Any], report: Report, columns: Tensor, turn: Turn | None
    ) -> None:
        super().__init__(arguments)
        self.report = report
        self.columns = columns
        self.turn = turn

    @property
    def plans(self) -> dict[Modality, list[FusionPlan]]:
        """The plan of every image and video of the prompt, by modality, in prompt order."""
        plans: dict[Modality, list[FusionPlan]] = {}
        for item in () if self.turn is None else self.turn.items:
            plans.setdefault(item.modality, []).append(item.plan)
        return plans

    def to(self, device: torch.device | str) -> CompressedInputs:
        """The same with every tensor on another device."""
        return CompressedInputs(
            _moved(dict(self), device), self.report, *_moved((self.columns, self.turn), device)
        )

    def copy(self) -> CompressedInputs:
        return CompressedInputs(self, self.report, self.columns, self.turn)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedInputs:
        # A tensor that stands in a graph can be cloned, but not copied by its own method.
        parts = _mapped(
            (dict(self), self.columns, self.turn), torch.clone, lambda x: copy.deepcopy(x, memo)
        )
        return CompressedInputs(parts[0], self.report, *parts[1:])

    def __reduce__(self) -> tuple[Any, ...]:
        # A graph is of this process alone.
        values = _mapped(dict(self), torch.detach)
        return CompressedInputs, (values, self.report, self.columns, self.turn)

    def __repr__(self) -> str:
        lengths = (self.report.prompt_before, self.report.prompt_after)
        before, after = (" + ".join(map(str, each)) for each in lengths)
        return f"CompressedInputs({before} -> {after} tokens: {', '.join(self)})"


def compress(
    model: Any,
    inputs: Mapping[str, Any],
    strategy: StrategyLike,
    /,
    *,
    padding_side: PaddingSide | None = None,
    frames_as_images: bool = False,
    registry: Registry | None = None,
    **options: Any,
) -> CompressedInputs:
    """Encode the images and videos of ``inputs``, compress them, and return the shorter inputs.

    ``inputs`` are the processor's; ``strategy`` is a name, a preset, a YAML file, a mapping or a
    Strategy, and ``options`` are set over its own: ``compress(model, inputs, "ttf", window=5)``.
    Rows are padded again on the side on which they were padded, left where they were not;
    ``padding_side`` overrides that. Some models are shown a video as images, frame by frame:
    ``frames_as_images`` makes one video of the images of each prompt, so that frames are compared
    with each other. Use the result once: ``model.generate(**short)``. Slice the answer by
    ``short["input_ids"]``. A prompt without images or videos comes back as it was, and
    ``report.reason`` says so. The model gets the rope delta that a later turn needs; nothing else
    in it changes.

    Gradients reach the vision tower where the model trains. In eval mode nothing is kept for them,
    and a backward pass that would need them raises UnsupportedModelError.

    Raises ConfigError, UnsupportedModelError, PromptError, PlanError or TokensError.
    """
    if padding_side not in (None, "left", "right"):
        raise ConfigError(f"padding_side is {padding_side!r}; valid: left, right, None (as it is)")
    check_frames_as_images(frames_as_images)
    known = registry or default_registry()
    adapter = prompt_adapter(model, known)
    chosen = get_configuration(strategy, registry=known, **options)
    if acts_inside(chosen.strategy):
        raise ConfigError(
            f"strategy {chosen.strategy.name} acts inside the LLM, while the model reads and "
            "answers, which compress does not see; expected attach"
        )
    if chosen.attention == "proportional":
        raise ConfigError(
            "attention: proportional acts while the model reads and answers, which compress does "
            "not see; expected attention: plain, or use attach"
        )
    refuse_unmet_needs(adapter, chosen, frames_as_images)
    wanted = torch.is_grad_enabled()
    # Users answer with generate, which keeps nothing for a backward pass; neither must this.
    with torch.set_grad_enabled(wanted and model.training):
        short = compress_prompt(
            adapter,
            adapter.read(inputs),
            chosen,
            padding_side=padding_side,
            frames_as_images=frames_as_images,
            observe=known.observe,
        )
    if wanted and not model.training and "mm_encoder_outputs" in short:
        refuse_backward(adapter, inputs, short["mm_encoder_outputs"])
    return short


def check_frames_as_images(value: Any) -> None:
    """Raise ConfigError unless it is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(
            f"frames_as_images is {value!r}; expected True, where the images of a prompt are the "
            "frames of one video, or False"
        )


def prompt_adapter(model: Any, registry: Registry) -> Adapter:
    """The adapter that shortens ``model``'s prompts. Raises UnsupportedModelError."""
    adapter = registry.adapter(model)
    if not isinstance(adapter, Adapter):
        raise UnsupportedModelError(
            f"adapter {adapter.name} acts inside {type(model).__name__}, which has no prompt; "
            "expected a vision-language model: use attach on this one"
        )
    return adapter


def encode_prompt(
    adapter: Adapter,
    prompt: Prompt,
    strategy: Strategy,
    frames_as_images: bool = False,
    after: Turn | None = None,
) -> list[Encoded]:
    """What the vision tower makes of a prompt, with what the strategy needs beside features."""
    acting = strategy if acts_at_tower(strategy) else None
    return adapter.encode(prompt, needs_of(strategy), frames_as_images, after, acting)


def acts_at_tower(strategy: Strategy) -> bool:
    """Whether a strategy does something before or inside the vision tower."""
    return strategy.acts_before_tower or strategy.acts_in_tower


def needs_of(strategy: Strategy) -> dict[Modality, Needs]:
    """What the strategy asks the adapter for, beside the features of images and videos."""
    return {modality: part.needed() for modality, part in _parts(strategy).items()}


def compress_prompt(
    adapter: Adapter,
    prompt: Prompt,
    configuration: Configuration,
    *,
    encoded: Sequence[Encoded] | None = None,
    plans: Mapping[Modality, Sequence[FusionPlan]] | None = None,
    after: Turn | None = None,
    padding_side: PaddingSide | None = None,
    frames_as_images: bool = False,
    observe: Observe = _nobody,
) -> CompressedInputs:
    """The shorter inputs of a prompt that has been read.

    ``encoded``: what ``encode_prompt`` made of it, if that has been done. ``plans``: one for each
    item, in place of the strategy's. ``after``: what a cache has read of the prompt; the rest is
    compressed, and padded on the left where rows lose unequally many tokens. ``observe`` hears of
    each plan and of the report.
    """
    watch = Stopwatch(adapter.model.device)
    strategy = configuration.strategy
    inside = acts_inside(strategy)
    if not prompt.shows:
        return _unchanged(adapter, prompt, configuration, observe)
    if encoded is None:
        encoded = encode_prompt(adapter, prompt, strategy, frames_as_images, after)
    watch.lap()
    made = {
        part.modality: _plans(part, strategy, observe) if plans is None else plans[part.modality]
        for part in encoded
    }
    finite: list[Tensor] = []
    fused = {
        part.modality: _fused(adapter, part, made[part.modality], strategy, finite)
        for part in encoded
    }
    watch.lap()
    held = 0 if after is None else after.length
    positions = adapter.positions(prompt)
    order = adapter.column_order(prompt, encoded, made)
    pixels = {name for m in prompt.shows for name in adapter.encoder_inputs(prompt.inputs, m)}
    owner = seen_from = None
    if configuration.attention == "proportional":
        seen_from = adapter.seen_from(prompt)
        owners = {part.modality: part.owners(made[part.modality]) for part in encoded}
        owner = prompt.owners(owners, held)
    marks = {part.modality: part.keep_mask(made[part.modality]) for part in encoded}
    short = shorten_prompt(
        prompt,
        prompt.kept(marks, held),
        positions,
        configuration.positions,
        side=padding_side if after is None else "left",
        after=after,
        order=order,
    )
    if after is not None:
        refuse_a_gap(adapter, short.valid[:, after.ids.shape[1] :])
    items = [
        item for part in encoded for item in _items(part, made[part.modality], strategy, inside)
    ]
    turn = replace(
        short.turn,
        items=in_prompt_order([*(() if after is None else after.items), *items]),
        shares=_shares(owner, seen_from, short, after, order),
    )
    watch.lap()
    counts = short.valid.sum(-1)
    # One host synchronisation for all that is asked here.
    new = counts if after is None else short.valid[:, after.ids.shape[1] :].sum(-1)
    asked = [counts + short.removed, counts, new]
    if finite:
        asked.append(torch.stack(finite).to(counts))
    before, left, lengths, flags = _split(torch.cat(asked).tolist(), len(counts))
    if not all(flags):
        raise PlanError(
            f"strategy {strategy.name} fused finite features into NaN or Inf; expected finite "
            "values: accumulate in float32"
        )
    if inside:
        visuals = _visuals(prompt, encoded, made, turn, lengths, after)
        turn = replace(turn, visuals=visuals)
    report = _report(
        adapter,
        configuration,
        [item.report for item in turn.items],
        before,
        left,
        watch.read(),
        sum(part.again for part in encoded),
        prompt.inputs,
        prompt.cache,
        [part.costs for part in encoded if part.costs is not None],
    )
    observe("tokenfuse_compressed", report=report)
    # What the model reads of a cache is its own delta: set last, and only here.
    adapter.set_position_delta(short.delta)
    rest = {name: value for name, value in prompt.inputs.items() if name not in pixels}
    own = {
        "input_ids": turn.ids,
        "attention_mask": turn.mask,
        "position_ids": turn.positions,
        **short.per_token,
    }
    arguments = {**rest, **own, "mm_encoder_outputs": fused}
    return CompressedInputs(arguments, report, turn.columns, turn)


def refuse_unmet_needs(
    adapter: Adapter, configuration: Configuration, frames_as_images: bool = False
) -> None:
    """Raise UnsupportedModelError unless the strategy can run before this model's LLM.

    ``frames_as_images``: as for ``compress``. Raises ConfigError where it does not go together with
    the strategy.
    """
    if configuration.attention == "proportional":
        refuse_fused_kernels(adapter.model)
    strategy = configuration.strategy
    if acts_at_tower(strategy):
        _refuse_tower(adapter, strategy)
        if frames_as_images:
            raise ConfigError(
                "images are shown as the frames of a video, which the vision tower reads one by "
                f"one, and strategy {strategy.name} acts before or inside it; expected "
                "frames_as_images=False, or a strategy that acts behind the tower"
            )
    for part in (strategy, *_parts(strategy).values()):
        if part.stage == "vit":
            raise UnsupportedModelError(
                f"strategy {part.name} acts at stage {part.stage}; on a model with a prompt "
                "strategies act at pre_llm or llm: choose one of these"
            )
    found = silent(strategy)
    if found is not None:
        raise UnsupportedModelError(f"strategy {found}")
    for part in _parts(strategy).values():
        needs = part.needed()
        wanted = {"saliency": needs.attention is not None, "text": needs.text}
        unmet = {need for need, asked in wanted.items() if asked} - adapter.supplies
        if unmet:
            raise UnsupportedModelError(
                f"strategy {part.name} needs {', '.join(sorted(unmet))}, which model family "
                f"{adapter.name} does not supply: choose a strategy that needs features only"
            )


def _refuse_tower(adapter: Adapter, strategy: Strategy) -> None:
    """Raise UnsupportedModelError where a strategy cannot act in the vision tower of this model."""
    kind, found = adapter.cuts_tower, None
    if kind is None:
        found = "whose vision tower has to read everything"
    elif kind == "frames" and strategy.acts_before_tower:
        found = "whose vision tower reads whole frames only, and never part of one"
    else:
        cuts = tower_cuts(strategy, len(adapter.tower_blocks))
        if kind == "frames" and not all(cut.frames for cut in cuts):
            found = "whose vision tower reads whole frames only, and never part of one"
        elif strategy.needed().attention is not None and any(cut.proportional for cut in cuts):
            raise UnsupportedModelError(
                f"strategy {strategy.name} reads attention of the vision tower, where another "
                "kernel weighs tokens by their sizes; expected one that reads none behind it"
            )
    if found is not None:
        raise UnsupportedModelError(
            f"strategy {strategy.name} acts before or inside the vision tower, and model family "
            f"{adapter.name} is one {found}; expected one of Qwen's, or a strategy that acts "
            "behind the tower"
        )


def acts_inside(strategy: Strategy) -> bool:
    """Whether a strategy does something inside the LLM, not only before it."""
    return bool(strategy.cuts()) or strategy.cache_pruning() is not None


def refuse_fused_kernels(model: Any) -> None:
    """Raise UnsupportedModelError where the model's attention takes no bias."""
    kind = model.config.get_text_config()._attn_implementation
    if kind not in TAKES_A_BIAS:
        raise UnsupportedModelError(
            f"attention: proportional adds to the logits of attention, which {kind} does not take; "
            f"expected {' or '.join(TAKES_A_BIAS)}: load the model with "
            'attn_implementation="sdpa", or use attention: plain'
        )


def refuse_a_gap(adapter: Adapter, valid: Tensor) -> None:
    """Raise PromptError where padding between turns would be read. One host sync for a hybrid."""
    if not all(attends(adapter.model.config.get_text_config())) and not bool(valid.all()):
        raise PromptError(
            "the prompts of a batch are unequally long in a later turn, and layers of "
            f"{type(adapter.model).__name__} that are no attention would read the padding between; "
            "expected one prompt at a time, or a new cache"
        )


class _NoBackward(torch.autograd.Function):
    """Passes features on, and raises where a gradient comes back to them."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, _: Tensor) -> Tensor:
        # A view could not be changed in place.
        return features.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise UnsupportedModelError(
            "a gradient reaches the vision tower, which compress ran in eval mode and kept nothing "
            "of; expected model.train() before compress, or attach, or parameters of the vision "
            "tower that need no gradient"
        )


def refuse_backward(adapter: Adapter, inputs: Mapping[str, Any], outputs: Any) -> None:
    """Let a backward pass through encoded features raise, if what is before them needs gradients.

    ``outputs``: the features, which are replaced by ones that raise.
    """
    base = adapter.model.base_model
    decoder = {id(parameter) for parameter in adapter.model.get_decoder().parameters()}
    pixels = (inputs.get(name) for name in PIXELS.values())
    wanted = any(isinstance(x, Tensor) and x.requires_grad for x in pixels)
    if wanted or any(p.requires_grad and id(p) not in decoder for p in base.parameters()):
        anchor = torch.zeros((), requires_grad=True)
        marked = _mapped(outputs, lambda x: _NoBackward.apply(x, anchor))
        outputs.update(marked)


def _mapped(
    value: Any, change: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda x: x
) -> Any:
    """``value`` with every tensor in its containers changed, and by ``other`` all else."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        fields = {name: _mapped(item, change, other) for name, item in value.items()}
        return fields if type(value) is dict else type(value)(**fields)
    if isinstance(value, list | tuple):
        parts = [_mapped(item, change, other) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Turn | FusionPlan | Shares | Visuals | Layers | Kept):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        changed = {name: _mapped(getattr(value, name), change, other) for name in names}
        return replace(value, **changed)
    return other(value)


def _moved(value: Any, device: torch.device | str) -> Any:
    return _mapped(value, lambda x: x.to(device))


def _parts(strategy: Strategy) -> dict[Modality, Strategy]:
    """The strategy of each modality that has one."""
    parts = {modality: strategy.for_modality(modality) for modality in MODALITIES}
    return {modality: part for modality, part in parts.items() if part is not None}


def _plans(part: Encoded, strategy: Strategy, observe: Observe) -> list[FusionPlan]:
    """The plan of each item of one modality."""
    plans, chosen = [], strategy.for_modality(part.kind)
    for tokens in part.items:
        if chosen is None:
            plan = FusionPlan.identity(tokens.num_tokens, tokens.features.device)
        else:
            plan = chosen.checked_plan(tokens)
        held = (tokens.features, plan.survivors, plan.target)
        before = [x._version for x in held if not x.is_inference()]
        observe("tokenfuse_planned", tokens=tokens, plan=plan, strategy=chosen or strategy)
        if before != [x._version for x in held if not x.is_inference()]:
            raise PlanError(
                "a plug-in's tokenfuse_planned wrote into the tokens or the plan that it was told "
                "of; expected that it only looks: work on a clone"
            )
        plans.append(plan)
    if part.cut is None:
        return plans
    return [TowerPlan.of(first, then) for first, then in zip(part.cut, plans, strict=True)]


def _split(values: list[int], rows: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Three lists of ``rows`` values each, and what follows them."""
    return (
        values[:rows],
        values[rows : 2 * rows],
        values[2 * rows : 3 * rows],
        values[3 * rows :],
    )


def _visuals(
    prompt: Prompt,
    encoded: Sequence[Encoded],
    made: Mapping[Modality, Sequence[FusionPlan]],
    turn: Turn,
    lengths: Sequence[int],
    after: Turn | None,
) -> Visuals:
    """Where the visual tokens stand in the short prompt of ``turn``.

    ``lengths``: how many tokens each row of it has that no cache holds. ``after``: what a cache
    holds of it.
    """
    rows, length = prompt.ids.shape
    held, earlier = (0 if after is None else after.length), [0] * rows
    for item in () if after is None else after.items:
        earlier[item.first[0]] += item.plan.num_kept
    here = torch.zeros_like(prompt.ids, dtype=torch.bool)
    place = prompt.ids.new_zeros(rows, length, 5)
    grids: list[Grid] = []
    counts, originals = [0] * rows, [0] * rows
    for part in encoded:
        plans = made[part.modality]
        found = []
        for span, tokens, plan, ((row, _), _) in zip(
            part.spans, part.items, plans, part.places, strict=True
        ):
            coords = grid_coords(tokens.grid, tokens.coords.device)
            own = coords.new_full((len(coords), 5), len(grids))
            own[:, :3] = coords
            own[plan.survivors, 4] = plan.sizes
            # Features that are no tokens, such as newlines, stay like text.
            every = own.new_full((span.size, 5), -1)
            found.append(every.index_copy(0, span.tokens(every.device), own))
            grids.append(tokens.grid)
            counts[row] += plan.num_kept
            originals[row] += plan.num_source
        values = torch.cat(found)
        here = prompt.in_place(part.modality, values[:, 3] >= 0, held, here)
        place = prompt.in_place(part.modality, values, held, place)
    columns = turn.columns
    here = here.gather(1, columns) & (turn.mask != 0)
    place = place.gather(1, columns[..., None].expand(-1, -1, 5))
    return Visuals(
        here,
        place[..., :3],
        place[..., 3],
        place[..., 4],
        tuple(grids),
        tuple(counts),
        tuple(originals),
        tuple(lengths),
        tuple(earlier),
    )


def _fused(
    adapter: Adapter,
    part: Encoded,
    plans: Sequence[FusionPlan],
    strategy: Strategy,
    finite: list[Tensor],
) -> Any:
    """The vision tower's output after the plans; ``finite`` gets a flag for each fused tensor."""
    by = strategy.for_modality(part.kind)

    def fuse(plan: FusionPlan, x: Tensor) -> Tensor:
        if isinstance(plan, TowerPlan):
            x = plan.first.fuse(x)
            plan = plan.then
        if by is None:
            return plan.fuse(x)
        made = by.checked_fuse(plan, x)
        finite.append(all_finite(made))
        return made

    return adapter.fuse(part, plans, fuse)


def _items(
    part: Encoded, plans: Sequence[FusionPlan], strategy: Strategy, inside: bool
) -> list[Item]:
    """What has become of each item of one modality.

    ``inside``: whether tokens go inside the LLM too, so that an item that is whole is not yet left
    alone.
    """
    # One host synchronisation for all items.
    left = torch.cat(
        [plan.frame_counts(x.grid) for plan, x in zip(plans, part.items, strict=True)]
    ).tolist()
    by = strategy.for_modality(part.kind)
    ends = [0, *itertools.accumulate(tokens.grid[0] for tokens in part.items)]
    return [
        Item(
            part.modality,
            *place,
            plan,
            ItemReport(
                modality=part.kind,
                grid=tokens.grid,
                tokens_before=plan.num_source,
                tokens_after=plan.num_kept,
                frame_tokens_after=left[ends[i] : ends[i + 1]],
                tower_tokens=None if part.costs is None else part.costs.tokens[i],
                tower_flops_before=0 if part.costs is None else part.costs.flops_before[i],
                tower_flops_after=0 if part.costs is None else part.costs.flops_after[i],
                matching_flops=0
                if by is None
                else by.matching_flops(tokens.grid, tokens.features.shape[-1]),
                reason=None if inside else _why_whole(strategy, part.kind, tokens, plan),
                hint=None if by is None else by.hint(tokens.grid),
            ),
        )
        for i, (place, tokens, plan) in enumerate(zip(part.places, part.items, plans, strict=True))
    ]


def _shares(
    owner: Tensor | None,
    seen_from: Tensor | None,
    short: Shortened,
    after: Turn | None,
    order: Tensor | None,
) -> Shares | None:
    """Which tokens each column of the short prompt stands for, if anything is read by that.

    ``owner``, ``seen_from``, ``order``: as for ``Shares.of``; the first two None where attention is
    plain.
    """
    if owner is None or seen_from is None:
        if after is None or after.shares is None:
            return None
        length = short.turn.length
        owner = torch.arange(length, device=short.turn.ids.device).expand(len(short.turn.ids), -1)
        seen_from = owner
    shares = Shares.of(owner, seen_from, short.turn.columns, short.valid, order)
    # What the cache holds was read by its own shares, whatever this configuration says.
    return shares if after is None else shares.continuing(after.read_as)


def _unchanged(
    adapter: Adapter, prompt: Prompt, configuration: Configuration, observe: Observe
) -> CompressedInputs:
    """The inputs of a prompt of text as they are."""
    report = untouched(adapter, configuration, prompt.mask.sum(-1).tolist(), prompt.inputs)
    observe("tokenfuse_compressed", report=report)
    columns = torch.arange(prompt.ids.shape[1], device=prompt.ids.device)
    return CompressedInputs(prompt.inputs, report, columns.expand_as(prompt.ids), None)


def untouched(
    adapter: Adapter,
    configuration: Configuration,
    lengths: list[int],
    inputs: Mapping[str, Any],
    reason: str = "the prompt has no image or video",
) -> Report:
    """The report of prompts of these lengths that stay as they are."""
    report = _report(adapter, configuration, [], lengths, lengths, [0.0, 0.0, 0.0], 0, inputs)
    return report.model_copy(update={"reason": reason})


def _report(
    adapter: Adapter,
    configuration: Configuration,
    items: list[ItemReport],
    before: list[int],
    after: list[int],
    laps: list[float],
    again: int,
    inputs: Mapping[str, Any],
    cache: Any = None,
    tower: Sequence[TowerCosts] = (),
) -> Report:
    """The report of one prompt, whose steps took ``laps`` milliseconds."""
    config = adapter.model.config.get_text_config()
    element = _element_bytes(adapter.model, inputs, cache)
    return Report(
        strategy=configuration.describe(),
        adapter=adapter.name,
        items=items,
        reason=_reason(items),
        encoded_again=again,
        prompt_before=before,
        prompt_after=after,
        matching_flops=sum(item.matching_flops for item in items),
        prefill_flops_before=prefill_flops(config, before),
        prefill_flops_after=prefill_flops(config, after),
        kv_cache_bytes_before=kv_cache_bytes(config, before, element),
        kv_cache_bytes_after=kv_cache_bytes(config, after, element),
        tower_ms=sum(costs.choose_ms for costs in tower),
        encode_ms=laps[0],
        plan_ms=laps[1],
        realign_ms=laps[2],
        versions=_versions(),
    )


def told_by_layer(
    adapter: Adapter,
    report: Report,
    visual: list[list[int]],
    score_ms: float,
    inputs: Mapping[str, Any],
) -> Report:
    """A report, after the LLM has read the prompt and tokens have gone inside it.

    ``visual``: how many visual tokens each layer has read of each row. ``score_ms``: what choosing
    them took.
    """
    rows = range(len(report.prompt_after))
    tokens = [
        [report.prompt_after[row] - visual[0][row] + layer[row] for row in rows] for layer in visual
    ]
    config = adapter.model.config.get_text_config()
    element = _element_bytes(adapter.model, inputs, cache_of(inputs))
    return report.model_copy(
        update={
            "layer_tokens": visual,
            "score_ms": score_ms,
            "prefill_flops_after": layered_prefill_flops(config, tokens),
            "kv_cache_bytes_after": layered_kv_cache_bytes(config, tokens, element),
        }
    )


def _element_bytes(model: Any, inputs: Mapping[str, Any], cache: Any) -> float:
    """Bytes of one number in the ``cache`` that a prompt with these inputs fills, or a new one.

    Of the text's dtype, which may not be the vision tower's. A quantised cache has its bits; the
    scales beside them, and the last tokens that it keeps whole, are left out.
    """
    layer = next(iter(getattr(cache, "layers", None) or ()), None)
    bits = getattr(layer, "nbits", None)
    if bits is None and inputs.get("cache_implementation") == "quantized":
        config = inputs.get("cache_config") or {}
        bits = config.get("nbits", 4) if isinstance(config, Mapping) else 4
    if bits is not None:
        return float(bits) / 8
    size: int = model.get_input_embeddings().weight.element_size()
    return size


def _why_whole(
    strategy: Strategy, kind: Modality, tokens: VisualTokens, plan: FusionPlan
) -> str | None:
    """Why an item stays whole, if it does."""
    by = strategy.for_modality(kind)
    if by is None and not acts_at_tower(strategy):
        return f"no strategy is given for {kind}s"
    # Before and inside the tower one strategy acts on images and videos.
    strategy = by or strategy
    if not plan.is_identity:
        return None
    if strategy.temporal and tokens.grid[0] == 1:
        return f"one frame only, and {strategy.name} compares frames"
    return "the strategy kept every token"


def _reason(items: Sequence[ItemReport]) -> str | None:
    reasons = list(dict.fromkeys(item.reason for item in items))
    return "; ".join(str(reason) for reason in reasons) if None not in reasons else None
