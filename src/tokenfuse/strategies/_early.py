"""The base of strategies that act before or inside the vision tower alone."""

from __future__ import annotations

from typing import ClassVar

from tokenfuse.errors import ConfigError
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Stage, Strategy
from tokenfuse.tokens import Modality, VisualTokens


class TowerStrategy(Strategy):
    """A strategy that acts before or inside the vision tower; behind it every token stays.

    A subclass writes ``tower_plan``, ``tower_cuts``, or both.
    """

    stage: ClassVar[Stage] = "tower"

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        raise ConfigError(
            f"strategy {self.name} acts before or inside the vision tower; expected compress or "
            "attach on a model: bare tokens have none"
        )

    def for_modality(self, modality: Modality) -> Strategy | None:
        return None
