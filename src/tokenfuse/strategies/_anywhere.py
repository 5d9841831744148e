"""The base of controls, which do not look at the tokens and so can act at any stage."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field, model_validator

from tokenfuse.errors import ConfigError
from tokenfuse.ops.select import budget
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Strategy
from tokenfuse.strategies._inside import PerhapsInside
from tokenfuse.strategies._layers import LayerTokens
from tokenfuse.strategies._tower import TowerCut, TowerTokens
from tokenfuse.tokens import Modality, VisualTokens


class Anywhere(PerhapsInside):
    """A strategy that keeps some of ``n`` tokens, whatever they are. A subclass writes ``pick``."""

    vision_block: int | None = Field(
        None,
        ge=0,
        description="vision block, counted from 0, at whose input the strategy acts instead of "
        "before the LLM",
    )

    @model_validator(mode="after")
    def _at_one_place(self) -> Anywhere:
        if self.layer is not None and self.vision_block is not None:
            raise ValueError(
                f"layer: {self.layer} and vision_block: {self.vision_block} are both given; "
                "expected one place: make a chain of two for both"
            )
        return self

    @abstractmethod
    def pick(self, n: int, count: int, device: torch.device) -> FusionPlan:
        """The plan that keeps ``count`` of ``n`` tokens."""

    def choose(self, tokens: VisualTokens, count: int) -> FusionPlan:
        return self.pick(tokens.num_tokens, count, tokens.features.device)

    def choose_inside(self, tokens: LayerTokens, count: int) -> FusionPlan:
        return self.pick(tokens.num_visual, count, tokens.visual.device)

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        if self.vision_block is not None:
            raise ConfigError(
                f"strategy {self.name} has vision_block: {self.vision_block}, and so acts inside "
                "the vision tower; expected compress or attach on a model, or no vision_block: "
                "bare tokens have no tower"
            )
        return super().plan(tokens)

    def for_modality(self, modality: Modality) -> Strategy | None:
        return super().for_modality(modality) if self.vision_block is None else None

    @property
    def acts_in_tower(self) -> bool:
        return self.vision_block is not None

    def tower_cuts(self, blocks: int) -> tuple[TowerCut, ...]:
        return () if self.vision_block is None else (TowerCut(self.vision_block, self._in_tower),)

    def _in_tower(self, tokens: TowerTokens) -> FusionPlan | None:
        n = tokens.num_tokens
        count = budget(self.keep_ratio or 1.0, n)
        return None if count == n else self.pick(n, count, tokens.states.device)
