"""What becomes of every token of a prompt, from the vision tower to the last decoder layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenfuse.adapters._base import Encoded
from tokenfuse.compression import (
    CompressedInputs,
    acts_at_tower,
    compress_prompt,
    encode_prompt,
    prompt_adapter,
    refuse_unmet_needs,
)
from tokenfuse.config import StrategyLike, get_configuration
from tokenfuse.errors import PromptError
from tokenfuse.inference.shown import Pictures, resized_frames, shown_frames
from tokenfuse.ops.similarity import NO_MATCH, rowwise
from tokenfuse.pictures.token_map import Step, TokenMap, targets
from tokenfuse.plan import FusionPlan
from tokenfuse.registry import Registry, default_registry
from tokenfuse.sessions._decoder import refuse_unfit_cuts
from tokenfuse.sessions.llm_stage import layer_stage
from tokenfuse.sessions.proportional import proportional_attention
from tokenfuse.tokens import VisualTokens


@torch.no_grad()
def trace(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    strategy: StrategyLike,
    /,
    *,
    frames: Sequence[Pictures] | None = None,
    timestamps: Sequence[Sequence[float]] | None = None,
    frames_as_images: bool = False,
    registry: Registry | None = None,
    **options: Any,
) -> list[TokenMap]:
    """What becomes of each token of every image and video of one prompt.

    ``inputs``: the processor's, of one prompt. ``frames``: what each image or video showed, ``(F,
    height, width, 3)`` uint8, for models whose processor's pixels cannot be turned back into
    pictures; ``timestamps``: when, one for each of these frames; both for the images of the prompt,
    then for its videos, as the maps come. A strategy that acts inside the
    LLM is followed layer by layer, for which the model reads the prompt once.

    Raises PromptError for a batch of several prompts, one without images and videos, and pixels
    that cannot be shown without ``frames``; else as ``attach`` does.
    """
    known = registry or default_registry()
    adapter = prompt_adapter(model, known)
    chosen = get_configuration(strategy, registry=known, **options)
    refuse_unmet_needs(adapter, chosen, frames_as_images)
    refuse_unfit_cuts(model, chosen.strategy, chosen.attention)
    prompt = adapter.read(inputs)
    if len(prompt.ids) != 1 or not prompt.shows:
        raise PromptError(
            f"a batch of {len(prompt.ids)} prompts, {len(prompt.shows)} kinds of images and videos "
            "in it; expected one prompt that shows something"
        )
    encoded = encode_prompt(adapter, prompt, chosen.strategy, frames_as_images)
    seen: list[tuple[VisualTokens, FusionPlan]] = []

    def observe(hook: str, /, **arguments: Any) -> None:
        if hook == "tokenfuse_planned":
            seen.append((arguments["tokens"], arguments["plan"]))

    count = sum(len(part.items) for part in encoded)
    for name, value in (("frames", frames), ("timestamps", timestamps)):
        if value is not None and len(value) != count:
            raise PromptError(
                f"{name} are {len(value)} and the prompt shows {count} images and videos; expected "
                "as many: those of the images, then those of the videos"
            )
    short = compress_prompt(adapter, prompt, chosen, encoded=encoded, observe=observe)
    layers = _layer_steps(model, chosen.strategy, short, encoded)
    maps, number = [], 0
    for part in encoded:
        grids = [tokens.grid for tokens in part.items]
        whole = short.plans.get(part.modality, [])
        for place, (tokens, plan) in enumerate(zip(part.items, whole, strict=True)):
            given = None if frames is None else frames[number]
            pictures = shown_frames(processor, inputs, part.modality, place, grids)
            if pictures is None and given is not None:
                pictures = resized_frames(given, tokens.grid)
            if pictures is None:
                raise PromptError(
                    f"the pixels of {type(processor).__name__} cannot be turned back into "
                    "pictures; expected frames=[...]: what each image or video showed"
                )
            steps = [Step("before the LLM", plan.keep_mask.cpu().numpy())]
            if acts_at_tower(chosen.strategy):
                first = Step("before or inside the vision tower", _left(tokens))
                steps.insert(0, first)
            steps += [Step(title, kept[number]) for title, kept in layers]
            order = plan.frame_order
            times = None
            if timestamps is not None:
                times = _per_frame(timestamps[number], tokens.grid[0])
            maps.append(
                TokenMap(
                    pictures,
                    tokens.grid,
                    targets(plan),
                    _distinct(steps),
                    _similarity(tokens, seen[number][1]),
                    times,
                    None if order is None else tuple(order.tolist()),
                    title=str(chosen.strategy),
                )
            )
            number += 1
    return maps


def _per_frame(timestamps: Sequence[float], count: int) -> tuple[float, ...]:
    """When each of ``count`` frames of the grid is shown: the mean of those that it stands for."""
    return tuple(float(part.mean()) for part in np.array_split(np.asarray(timestamps), count))


def _left(tokens: VisualTokens) -> npt.NDArray[np.bool_]:
    """Which places of the grid still have a token."""
    mask = np.zeros(prod(tokens.grid), dtype=bool)
    mask[_places(tokens)] = True
    return mask


def _places(tokens: VisualTokens) -> npt.NDArray[np.int64]:
    _, height, width = tokens.grid
    t, i, j = tokens.coords.cpu().numpy().T
    found: npt.NDArray[np.int64] = (t * height + i) * width + j
    return found


def _similarity(tokens: VisualTokens, plan: FusionPlan) -> npt.NDArray[np.float32]:
    """The cosine of each token with the survivor it went into; NaN where there is no other."""
    found = np.full(prod(tokens.grid), np.nan, dtype=np.float32)
    target = plan.target
    roots = plan.survivors[target.clamp_min(0)]
    own = torch.arange(len(target), device=target.device)
    fused = (target >= 0) & (roots != own)
    cosine = rowwise(tokens.features[fused], tokens.features[roots[fused]])
    cosine = cosine.masked_fill(cosine == NO_MATCH, torch.nan)
    found[_places(tokens)[fused.cpu().numpy()]] = cosine.cpu().numpy()
    return found


def _layer_steps(
    model: Any, strategy: Any, short: CompressedInputs, encoded: Sequence[Encoded]
) -> list[tuple[str, list[npt.NDArray[np.bool_]]]]:
    """What is left from each decoder layer on at which something goes, item by item."""
    turn = short.turn
    if turn is None or turn.visuals is None:
        return []
    visuals = turn.visuals
    with proportional_attention(model, turn.shares), layer_stage(model, strategy, turn) as stage:
        if stage is None:
            return []
        model(**short, use_cache=True, logits_to_keep=1)
        held = stage.after(turn).layers
    steps = []
    for kept in () if held is None else held.kept:
        columns = kept.columns[0][kept.valid[0]]
        masks = []
        for item, grid in enumerate(visuals.grids):
            mine = columns[(visuals.item[0] == item)[columns] & visuals.here[0][columns]]
            mask = np.zeros(prod(grid), dtype=bool)
            mask[_flat(visuals.coords[0][mine], grid)] = True
            masks.append(mask)
        steps.append((f"from layer {kept.layer} on", masks))
    return steps


def _flat(coords: Tensor, grid: Sequence[int]) -> npt.NDArray[np.int64]:
    t, i, j = coords.cpu().numpy().T
    found: npt.NDArray[np.int64] = (t * grid[1] + i) * grid[2] + j
    return found


def _distinct(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps at which something goes, and the first."""
    found = [steps[0]]
    for step in steps[1:]:
        if not np.array_equal(step.kept, found[-1].kept):
            found.append(step)
    return tuple(found)
