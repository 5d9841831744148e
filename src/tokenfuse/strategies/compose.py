"""Strategies one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import (
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from torch import Tensor

from tokenfuse.errors import ConfigError, PlanError
from tokenfuse.ops.select import budget
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Compressed, Needs, Strategy
from tokenfuse.strategies._layers import CachePruning, LayerCut
from tokenfuse.strategies._parts import PART, check_part, load_part
from tokenfuse.strategies._tower import PixelTokens, TowerCut
from tokenfuse.tokens import Grid, Modality, VisualTokens

MOST_STEPS = 64
"""Strategies of one chain."""


@dataclass(frozen=True, eq=False, repr=False)
class ChainedPlan(FusionPlan):
    """All plans of a chain as one.

    ``steps``: the plan of each strategy, for the survivors of the one before.
    """

    steps: tuple[FusionPlan, ...]


class Compose(Strategy):
    """Apply strategies one after the other, each to what the one before left.

    In YAML ``compose: [ttf, {strategy: attention, keep_ratio: 0.5}]``, by names, presets, files or
    mappings. A later step sees the fused features and the coordinates of survivors, with their own
    saliency; one that needs every place of the grid can only come first.

    ``keep_ratio`` is the share of all tokens, as the vision tower would have made them, that the
    last step before the LLM leaves. Where the earlier steps
    leave fewer, there is nothing more to remove, so that the count may be below the one asked for.
    A step that compares frames leaves an image to the next one as it is.

    Steps that act inside the LLM come last, at rising layers: ``compose: [ttf, {strategy: fastv,
    layer: 20, keep_ratio: 0.3}]``.

    Synchronises with the host as often as its steps do.
    """

    name: ClassVar[str] = "compose"

    compose: Annotated[
        tuple[Strategy, ...],
        WithJsonSchema(
            {"type": "array", "items": {"anyOf": PART}, "minItems": 1, "maxItems": MOST_STEPS}
        ),
    ] = Field(min_length=1, max_length=MOST_STEPS, description="the strategies, first to last")
    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="share of tokens that the last step leaves, at most"
    )

    @field_validator("compose", mode="before")
    @classmethod
    def _load(cls, steps: Any, info: ValidationInfo) -> Any:
        if isinstance(steps, str) or not isinstance(steps, Sequence):
            raise ValueError("it should be a list of strategies, such as [ttf, attention]")
        if len(steps) > MOST_STEPS:
            raise ValueError(f"it has {len(steps)} steps; expected {MOST_STEPS} or fewer")
        return tuple(load_part(step, info, i) for i, step in enumerate(steps))

    @field_validator("compose")
    @classmethod
    def _chainable(cls, steps: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        for step in steps:
            check_part(step)
        inside = [cut.layer for step in steps for cut in step.cuts()]
        if inside != sorted(set(inside)):
            raise ValueError(
                f"its steps act at layers {inside}, in this order; expected each layer once, rising"
            )
        if len([step for step in steps if step.cache_pruning()]) > 1:
            raise ValueError("several of its steps prune the cache; expected one")
        late = next((step for step in steps[1:] if step.acts_before_tower), None)
        if late is not None:
            raise ValueError(f"{late.name} acts before the vision tower, so it can only come first")
        for former, later in pairwise(steps):
            last, next_ = max(_places(former)), min(_places(later))
            if last > next_:
                raise ValueError(
                    f"{former.name} acts {PLACES[last]}, and {later.name} behind it acts "
                    f"{PLACES[next_]}; expected them the other way round"
                )
        for step in steps[1:]:
            if step.needs_grid:
                raise ValueError(
                    f"{_first(step).name} needs every place of the grid, so it can only come first"
                )
        if len({step.needed().attention for step in steps} - {None}) > 1:
            raise ValueError("its steps read the attention of different vision blocks; set one")
        return steps

    @model_validator(mode="after")
    def _last_has_a_budget(self) -> Compose:
        last = _last(self)
        if self.keep_ratio is not None and last.cuts():
            raise ValueError(
                f"keep_ratio is for the last step before the LLM, and {last.name} acts inside it; "
                "expected the keep_ratio of each step in the step"
            )
        if self.keep_ratio is not None and not _before_llm(last):
            raise ValueError(
                f"keep_ratio is for the last step before the LLM, and {last.name} acts before or "
                "inside the vision tower alone; expected the keep_ratio of each step in the step"
            )
        if self.keep_ratio is not None and "keep_ratio" not in type(last).model_fields:
            raise ValueError(f"keep_ratio is for the last step, and {last.name} has none")
        return self

    @field_serializer("compose")
    def _describe_steps(self, steps: tuple[Strategy, ...]) -> list[dict[str, Any]]:
        return [step.describe() for step in steps]

    def needed(self) -> Needs:
        each = [step.needed() for step in self.compose]
        attention = next((needs.attention for needs in each if needs.attention), None)
        return Needs(attention, any(needs.text for needs in each))

    @property
    def needs_grid(self) -> bool:
        return self.compose[0].needs_grid

    @property
    def acts_before_tower(self) -> bool:
        return self.compose[0].acts_before_tower

    def tower_plan(self, pixels: PixelTokens) -> FusionPlan | None:
        return self.compose[0].tower_plan(pixels)

    @property
    def acts_in_tower(self) -> bool:
        return any(step.acts_in_tower for step in self.compose)

    def tower_cuts(self, blocks: int) -> tuple[TowerCut, ...]:
        return tuple(cut for step in self.compose for cut in step.tower_cuts(blocks))

    @property
    def _before(self) -> list[Strategy]:
        return [step for step in self.compose if _before_llm(step)]

    def for_modality(self, modality: Modality) -> Strategy | None:
        return self if self._before else None

    def at_share(self, share: float, layers: int) -> Self:
        if self.cuts():
            raise ConfigError(
                "a chain that ends inside the LLM has several shares, and one number does not say "
                "them; expected each in its step"
            )
        return super().at_share(share, layers)

    def cuts(self) -> tuple[LayerCut, ...]:
        return tuple(cut for step in self.compose for cut in step.cuts())

    def cache_pruning(self) -> CachePruning | None:
        return next((found for step in self.compose if (found := step.cache_pruning())), None)

    def compress(self, tokens: VisualTokens) -> Compressed:
        early = next((s for s in self.compose if s.acts_before_tower or s.acts_in_tower), None)
        if early is not None:
            raise ConfigError(
                f"strategy {early.name} of a chain acts before or inside the vision tower; "
                "expected compress or attach on a model, or a chain without it: bare tokens have "
                "no tower"
            )
        return super().compress(tokens)

    @torch.no_grad()
    def plan(self, tokens: VisualTokens) -> ChainedPlan:
        n, every = tokens.num_tokens, prod(tokens.grid)
        # Behind the tower there are fewer tokens than the share is of.
        early = self.acts_before_tower or self.acts_in_tower
        most = budget(self.keep_ratio, every if early else n) if self.keep_ratio else None
        whole, plans = FusionPlan.identity(n, tokens.features.device), []
        for position, step in enumerate(self._before, start=1):
            if most is not None and position == len(self._before):
                if tokens.num_tokens <= most:
                    break
                # A step that acts in the tower, too, has a share of all tokens itself.
                among = every if step.acts_in_tower else tokens.num_tokens
                step = step.model_copy(update={"keep_ratio": most / among})
            plan = step.plan(tokens)
            tokens = tokens.after(plan.survivors, step.fuse(plan, tokens.features))
            whole = whole.compose(plan)
            plans.append(plan)
        order = whole.frame_order
        return ChainedPlan(whole.survivors, whole.target, tuple(plans), frame_order=order)

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        if not isinstance(plan, ChainedPlan):
            raise PlanError(
                f"a chain fuses by the plan that it made; got a {type(plan).__name__}, expected a "
                "ChainedPlan"
            )
        for step, part in zip(self._before, plan.steps, strict=False):
            x = step.fuse(part, x)
        return x

    def matching_flops(self, grid: Grid, width: int) -> int:
        # What later steps cost depends on what the first leaves.
        return self._before[0].matching_flops(grid, width) if self._before else 0


PLACES = ("before or inside the vision tower", "before the LLM", "inside the LLM")
"""Where a step can act, in the order of a model."""


def _places(step: Strategy) -> list[int]:
    """The indices in PLACES of where a step acts."""
    acts = (
        step.acts_before_tower or step.acts_in_tower,
        _before_llm(step),
        bool(step.cuts()) or step.cache_pruning() is not None,
    )
    return [i for i, there in enumerate(acts) if there]


def _before_llm(step: Strategy) -> bool:
    """Whether a step does something before the LLM."""
    return step.for_modality("video") is not None


def _first(step: Strategy) -> Strategy:
    """The strategy that a step begins with, inside chains too."""
    return _first(step.compose[0]) if isinstance(step, Compose) else step


def _last(step: Strategy) -> Strategy:
    return _last(step.compose[-1]) if isinstance(step, Compose) else step
