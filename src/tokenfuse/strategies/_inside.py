"""Bases of the strategies that act at decoder layers."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator

from tokenfuse.errors import ConfigError
from tokenfuse.ops.select import budget
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Budgeted, Stage, Strategy
from tokenfuse.strategies._fields import as_tuple, one_or_more
from tokenfuse.strategies._layers import LayerCut, LayerTokens
from tokenfuse.tokens import Grid, Modality, VisualTokens

Layer = Annotated[
    int,
    Field(
        ge=1,
        description="decoder layer, counted from 0, whose input is cut; those before it read all",
    ),
]


LayerSchedule = Annotated[
    tuple[Layer, ...],
    Field(min_length=1, description="decoder layers at whose input tokens go, rising"),
    one_or_more({"type": "integer", "minimum": 1}),
]
LayerShares = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...],
    Field(
        min_length=1,
        description="share of the prompt's visual tokens that is left from each layer on, falling",
    ),
    one_or_more({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
]


def share_after(share: float, layer: int, layers: int) -> float:
    """The share that may be left from ``layer`` on, so that ``layers`` read ``share`` on average.

    Raises ConfigError where the layers before have read more than that already.
    """
    if not 0 < layer < layers:
        raise ConfigError(f"layer is {layer} of {layers} layers; expected 1 to {layers - 1}")
    left = (share * layers - layer) / (layers - layer)
    if left <= 0:
        raise ConfigError(
            f"the {layer} layer(s) of {layers} before the cut read {layer / layers:.0%} of the "
            f"tokens on average already; expected a share above that, got {share:g}"
        )
    return min(1.0, left)


def in_proportion(layers: tuple[int, ...], number: int) -> tuple[int, ...]:
    """LayerSchedule of a decoder of 32, where papers state them, for one of ``number`` layers."""
    if layers[-1] < number:
        return layers
    found = sorted({max(1, round(layer * number / 32)) for layer in layers})
    return tuple(layer for layer in found if layer < number) or (number - 1,)


class LayerStrategy(Strategy):
    """A strategy that acts at decoder layers; before the LLM every token stays.

    A subclass writes ``cuts``.
    """

    stage: ClassVar[Stage] = "llm"

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        raise ConfigError(
            f"strategy {self.name} acts at decoder layers, by what the model has made of the "
            "prompt there; expected attach(model, ...): bare tokens are not enough"
        )

    def for_modality(self, modality: Modality) -> Strategy | None:
        return None


class Scheduled(LayerStrategy):
    """A strategy that acts at several layers, with a share of the first count at each."""

    layers: LayerSchedule
    keep_ratio: LayerShares

    @field_validator("layers", "keep_ratio", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return as_tuple(value)

    def at_share(self, share: float, layers: int) -> Self:
        """All shares of the schedule to one power, which makes the average.

        A schedule for more layers is stretched to the decoder as if it were for 32.
        """
        at = in_proportion(self.layers, layers)
        ratios = self.keep_ratio[-len(at) :]
        share_after(share, at[0], layers)
        ends = (*at[1:], layers)

        def average(power: float) -> float:
            parts = zip(ratios, at, ends, strict=True)
            read = sum(float(ratio**power) * (end - start) for ratio, start, end in parts)
            return (at[0] + read) / layers

        low, high = 0.0, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if average(middle) > share else (low, middle)
        return self.with_options(layers=at, keep_ratio=tuple(r**high for r in ratios))

    @model_validator(mode="after")
    def _schedule(self) -> Scheduled:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"layers: {list(self.layers)} do not rise; expected {sorted(set(self.layers))}"
            )
        ratios = self.keep_ratio
        if len(ratios) != len(self.layers):
            raise ValueError(
                f"keep_ratio has {len(ratios)} value(s) for {len(self.layers)} layer(s); expected "
                "one for each"
            )
        if list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(
                f"keep_ratio: {list(ratios)} grows from layer to layer, and what is gone does not "
                f"come back; expected {sorted(ratios, reverse=True)}"
            )
        return self


class PerhapsInside(Budgeted):
    """A strategy that acts before the LLM, or with ``layer`` at a decoder layer instead.

    A subclass writes ``choose``, and ``choose_inside``.
    """

    layer: Layer | None = Field(
        None,
        description="decoder layer, counted from 0, at whose input the strategy acts instead of "
        "before the LLM",
    )

    @abstractmethod
    def choose_inside(self, tokens: LayerTokens, count: int) -> FusionPlan:
        """The plan with ``count`` survivors for the visual tokens at the layer."""

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        if self.layer is not None:
            raise ConfigError(
                f"strategy {self.name} has layer: {self.layer}, and so acts inside the LLM; "
                "expected attach(model, ...), or no layer"
            )
        return super().plan(tokens)

    def for_modality(self, modality: Modality) -> Strategy | None:
        return self if self.layer is None else None

    def num_kept(self, grid: Grid) -> int | None:
        return super().num_kept(grid) if self.layer is None else prod(grid)

    def cuts(self) -> tuple[LayerCut, ...]:
        return () if self.layer is None else (self._cut(self.layer),)

    def at_share(self, share: float, layers: int) -> Self:
        if self.layer is None:
            return super().at_share(share, layers)
        return self.with_options(keep_ratio=share_after(share, self.layer, layers))

    def _cut(self, layer: int) -> LayerCut:
        return LayerCut(layer, self._plan_inside)

    @torch.no_grad()
    def _plan_inside(self, tokens: LayerTokens) -> FusionPlan:
        count = budget(self.keep_ratio or 1.0, tokens.num_visual)
        if count == tokens.num_visual:
            return FusionPlan.identity(count, tokens.states.device)
        return self.choose_inside(tokens, count)
