"""``compress``: a model's inputs in, shorter inputs for the same model out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenfuse.adapters._base import (
    MODALITIES,
    PER_TOKEN,
    PIXELS,
    Adapter,
    Encoded,
    Plans,
)
from tokenfuse.config import StrategyLike, get_strategy
from tokenfuse.costs import Stopwatch, kv_cache_bytes, prefill_flops, versions
from tokenfuse.errors import ConfigError, PromptError, UnsupportedModelError
from tokenfuse.plan import FusionPlan
from tokenfuse.prompt.cache import cache_of, filled_length
from tokenfuse.prompt.realign import PaddingSide
from tokenfuse.prompt.shares import Shares
from tokenfuse.registry import Registry, default_registry
from tokenfuse.report import ItemReport, Report
from tokenfuse.sessions.proportional import refuse_fused_kernels
from tokenfuse.strategies._base import Needs, Strategy
from tokenfuse.tokens import Modality, VisualTokens

# Reading the metadata of packages takes milliseconds.
_versions = functools.cache(versions)


class CompressedInputs(dict[str, Any]):
    """Keyword arguments for ``model.generate`` or ``model(...)``, with ``report`` and ``plans``.

    ``columns``: the column of the caller's prompt that each token of the shorter one comes from,
    ``(B, L')``.
    """

    report: Report
    plans: dict[Modality, list[FusionPlan]]
    columns: Tensor
    shares: Shares | None = None
    """Which tokens each stands for, where attention is to be proportional to their number."""


def compress(
    model: Any,
    inputs: Mapping[str, Any],
    strategy: StrategyLike,
    *,
    padding_side: PaddingSide | None = None,
    frames_as_images: bool = False,
    registry: Registry | None = None,
) -> CompressedInputs:
    """Encode the images and videos of ``inputs``, compress them, and return the shorter inputs.

    ``inputs`` are the processor's; ``strategy`` is a name, a preset, a YAML file, a mapping or a
    Strategy. Rows are padded again on the side on which they were padded, left where they were not;
    ``padding_side`` overrides that. Some models are shown a video as images, frame by frame:
    ``frames_as_images=True`` makes one video of the images of each prompt, so that frames are
    compared with each other. Use the result once: ``model.generate(**short)``. Slice the
    answer by ``short["input_ids"]``. A prompt without images or videos comes back as it was, and
    ``report.reason`` says so. The model gets the rope delta that a later turn needs; nothing else
    in it changes. Gradients are recorded only while the model trains.

    Raises ConfigError, UnsupportedModelError, PromptError, PlanError or TokensError.
    """
    if padding_side not in (None, "left", "right"):
        raise ConfigError(f"padding_side is {padding_side!r}; valid: left, right, None (as it is)")
    registry = registry or default_registry()
    adapter, chosen = prompt_adapter(model, registry), get_strategy(strategy, registry=registry)
    if chosen.attention == "proportional":
        raise ConfigError(
            "attention: proportional acts while the model reads and answers, which compress does "
            "not see; expected attention: plain, or use attach"
        )
    return compress_with(adapter, inputs, chosen, registry, padding_side, frames_as_images)


def prompt_adapter(model: Any, registry: Registry) -> Adapter:
    """The adapter that shortens ``model``'s prompts. Raises UnsupportedModelError."""
    adapter = registry.adapter(model)
    if not isinstance(adapter, Adapter):
        raise UnsupportedModelError(
            f"adapter {adapter.name} acts inside {type(model).__name__}, which has no prompt; "
            "expected a vision-language model: use attach on this one"
        )
    return adapter


def compress_with(
    adapter: Adapter,
    inputs: Mapping[str, Any],
    strategy: Strategy,
    registry: Registry,
    padding_side: PaddingSide | None = None,
    frames_as_images: bool = False,
) -> CompressedInputs:
    """``compress`` with the adapter and the strategy at hand."""
    refuse_unmet_needs(adapter, strategy)
    check_prompt(adapter, inputs)
    if not adapter.has_visuals(inputs):
        return _unchanged(adapter, inputs, strategy, registry)
    watch = Stopwatch(adapter.model.device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and adapter.model.training):
        encoded = adapter.encode(inputs, needs_of(strategy), frames_as_images)
        watch.lap()
        plans = {part.modality: plan_items(part, strategy, registry) for part in encoded}
        fused = fuse_all(adapter, encoded, plans, strategy)
        watch.lap()
    prompt, new = adapter.realign(inputs, encoded, plans, strategy.positions, padding_side)
    watch.lap()
    read = {name for part in encoded for name in adapter.encoder_inputs(inputs, part.modality)}
    rest = {name: value for name, value in inputs.items() if name not in read}
    short = CompressedInputs({**rest, **prompt, "mm_encoder_outputs": fused})
    short.plans, short.columns = plans, new.columns
    if strategy.attention == "proportional":
        owners, seen_from = adapter.owners(inputs, encoded, plans), adapter.seen_from(inputs)
        short.shares = Shares.of(owners, seen_from, new.columns, new.valid)
    after = new.valid.sum(-1)
    before = after + new.removed
    short.report = report_on(
        adapter, strategy, encoded, plans, before.tolist(), after.tolist(), watch.read()
    )
    registry.observe("tokenfuse_compressed", report=short.report)
    return short


def _parts(strategy: Strategy) -> dict[Modality, Strategy]:
    """The strategy of each modality that has one."""
    parts = {modality: strategy.for_modality(modality) for modality in MODALITIES}
    return {modality: part for modality, part in parts.items() if part is not None}


def needs_of(strategy: Strategy) -> dict[Modality, Needs]:
    """What the strategy of each modality asks the adapter for."""
    return {modality: part.needed() for modality, part in _parts(strategy).items()}


def refuse_unmet_needs(adapter: Adapter, strategy: Strategy) -> None:
    """Raise UnsupportedModelError unless the strategy can run before this model's LLM."""
    if strategy.attention == "proportional":
        refuse_fused_kernels(adapter.model)
    for part in (strategy, *_parts(strategy).values()):
        if part.stage != "pre_llm":
            raise UnsupportedModelError(
                f"strategy {part.name} acts at stage {part.stage}; compress and attach act at "
                "pre_llm: choose a pre_llm strategy"
            )
    for part in _parts(strategy).values():
        needs = part.needed()
        wanted = {"saliency": needs.attention is not None, "text": needs.text}
        unmet = {need for need, asked in wanted.items() if asked} - adapter.supplies
        if unmet:
            raise UnsupportedModelError(
                f"strategy {part.name} needs {', '.join(sorted(unmet))}, which adapter "
                f"{adapter.name} does not supply: choose a strategy that needs features only"
            )


def check_prompt(adapter: Adapter, inputs: Mapping[str, Any]) -> None:
    """Raise PromptError where the inputs cannot be shortened without changing what they mean."""
    ids = getattr(inputs, "get", lambda _: None)("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise PromptError(
            "inputs hold no input_ids of shape (B, L); expected the processor's output with "
            'return_tensors="pt", not inputs_embeds'
        )
    if inputs.get("mm_encoder_outputs"):
        raise PromptError(
            "inputs hold mm_encoder_outputs, features that are encoded or compressed already; "
            "expected pixels: pass the processor's output, or leave the attach block"
        )
    if filled_length(cache_of(inputs)):
        if adapter.has_visuals(inputs):
            raise PromptError(
                "the cache holds a prompt already, and the inputs bring images or videos; "
                "expected an empty cache, or under attach one that its generate filled: start with "
                "a new cache and the whole conversation"
            )
        return
    if not adapter.has_visuals(inputs):
        # Placeholders without pixels would be read as if they were words.
        adapter.kept_columns(inputs, [], {})
        return
    for name in ("inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k"):
        if inputs.get(name) is not None:
            raise PromptError(
                f"inputs hold {name}, which cannot be shortened; expected the processor's output, "
                "one prompt per row"
            )
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise PromptError(
            "logits_to_keep is a tensor of columns, which move; expected a number of last columns"
        )
    mask, pad = inputs.get("attention_mask"), adapter.pad_id()
    if mask is None and pad is not None and bool((ids == pad).any()):
        raise PromptError(
            "input_ids hold the padding token, and attention_mask is missing; expected (B, L): "
            "pass the processor's attention_mask"
        )
    for name in ("attention_mask", *PER_TOKEN):
        value = inputs.get(name)
        if value is not None and getattr(value, "shape", None) != ids.shape:
            raise PromptError(
                f"{name} has shape {tuple(getattr(value, 'shape', ()))}; expected (B, L) as "
                f"input_ids, {tuple(ids.shape)}"
            )
    _check_positions(inputs.get("position_ids"), mask, ids)
    known = {"input_ids", "attention_mask", "position_ids", *PER_TOKEN, *PIXELS.values()}
    for name, value in inputs.items():
        if name not in known and isinstance(value, Tensor) and value.shape[:2] == ids.shape:
            raise PromptError(
                f"{name} has one column per prompt token, and tokenfuse does not know how to "
                f"shorten it; expected the processor's output: leave {name} out"
            )


def _check_positions(positions: Tensor | None, mask: Tensor | None, ids: Tensor) -> None:
    if positions is None:
        return
    if positions.shape[-1] != ids.shape[1] or positions.ndim not in (2, 3):
        raise PromptError(
            f"position_ids have shape {tuple(positions.shape)}; expected (B, L), (3, B, L) or "
            f"(4, B, L) with L = {ids.shape[1]}, or none: the model computes them"
        )
    text = positions[0] if positions.ndim == 3 and positions.shape[0] == 4 else positions
    if mask is None and text.ndim == 2 and bool((text.diff() <= 0).any()):
        raise PromptError(
            "position_ids start anew within a row, as of several prompts packed into one; expected "
            "one prompt per row: pad instead of packing"
        )


def plan_items(
    part: Encoded, strategy: Strategy, registry: Registry, only: Sequence[int] | None = None
) -> list[FusionPlan]:
    """The plans of all items of one modality, or of some."""
    plans, chosen = [], strategy.for_modality(part.kind)
    for i in range(len(part.items)) if only is None else only:
        tokens = part.items[i]
        if chosen is None:
            plan = FusionPlan.identity(tokens.num_tokens, tokens.features.device)
        else:
            plan = chosen.plan(tokens)
            plan.check(tokens.num_tokens)
        registry.observe("tokenfuse_planned", tokens=tokens, plan=plan, strategy=chosen or strategy)
        plans.append(plan)
    return plans


def fuse_all(
    adapter: Adapter,
    encoded: Sequence[Encoded],
    plans: Plans,
    strategy: Strategy,
    only: Mapping[Modality, Sequence[int]] | None = None,
) -> dict[Modality, Any]:
    """The vision tower's outputs after the plans, of all items or of ``only`` some."""
    fused = {}
    for part in encoded:
        chosen = None if only is None else only[part.modality]
        if chosen is None or chosen:
            by = strategy.for_modality(part.kind)
            fuse = FusionPlan.fuse if by is None else by.fuse
            fused[part.modality] = adapter.fuse(part, plans[part.modality], fuse, chosen)
    return fused


def _unchanged(
    adapter: Adapter, inputs: Mapping[str, Any], strategy: Strategy, registry: Registry
) -> CompressedInputs:
    same = CompressedInputs(inputs)
    same.plans = {}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    same.columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    lengths = mask.sum(-1).tolist()
    same.report = report_on(adapter, strategy, [], {}, lengths, lengths, [0.0, 0.0, 0.0])
    registry.observe("tokenfuse_compressed", report=same.report)
    return same


def report_on(
    adapter: Adapter,
    strategy: Strategy,
    encoded: Sequence[Encoded],
    plans: Plans,
    before: list[int],
    after: list[int],
    laps: list[float],
) -> Report:
    """The report of one compressed prompt, whose steps took ``laps`` milliseconds."""
    config = adapter.model.config.get_text_config()
    element = torch.empty(0, dtype=adapter.model.dtype).element_size()
    items, matching = [], 0
    for part in encoded:
        chosen = strategy.for_modality(part.kind)
        for tokens, plan in zip(part.items, plans[part.modality], strict=True):
            if chosen is not None:
                matching += chosen.matching_flops(tokens.grid, tokens.features.shape[-1])
            items.append(
                ItemReport(
                    modality=part.kind,
                    grid=tokens.grid,
                    tokens_before=plan.num_source,
                    tokens_after=plan.num_kept,
                    frame_tokens_after=plan.frame_counts(tokens.grid).tolist(),
                    reason=_why_whole(chosen, part.kind, tokens, plan),
                )
            )
    return Report(
        strategy=strategy.describe(),
        adapter=adapter.name,
        items=items,
        reason=_reason(items),
        prompt_before=before,
        prompt_after=after,
        matching_flops=matching,
        prefill_flops_before=prefill_flops(config, before),
        prefill_flops_after=prefill_flops(config, after),
        kv_cache_bytes_before=kv_cache_bytes(config, before, element),
        kv_cache_bytes_after=kv_cache_bytes(config, after, element),
        encode_ms=laps[0],
        plan_ms=laps[1],
        realign_ms=laps[2],
        versions=_versions(),
    )


def _why_whole(
    strategy: Strategy | None, kind: Modality, tokens: VisualTokens, plan: FusionPlan
) -> str | None:
    """Why an item stays whole, if it does."""
    if strategy is None:
        return f"no strategy is given for {kind}s"
    if not plan.is_identity:
        return None
    if strategy.temporal and tokens.grid[0] == 1:
        return f"one frame only, and {strategy.name} compares frames"
    return "the strategy kept every token"


def _reason(items: list[ItemReport]) -> str | None:
    if not items:
        return "the prompt has no image or video"
    reasons = list(dict.fromkeys(item.reason for item in items))
    return "; ".join(str(reason) for reason in reasons) if None not in reasons else None
