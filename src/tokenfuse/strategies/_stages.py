"""Where in a model a strategy can act."""

from __future__ import annotations

from tokenfuse.strategies._base import Stage, Strategy
from tokenfuse.strategies._vit import VitStrategy


def stages(cls: type[Strategy]) -> list[Stage]:
    """Where a strategy can act: at its own stage, and at others if it knows how.

    In the order of a model, without repetition.
    """
    found: list[Stage] = []
    if cls.stage == "vit" or issubclass(cls, VitStrategy):
        found.append("vit")
    acts = (cls.tower_plan, cls.tower_cuts)
    if cls.stage == "tower" or acts != (Strategy.tower_plan, Strategy.tower_cuts):
        found.append("tower")
    if cls.stage == "pre_llm":
        found.append("pre_llm")
    own = (cls.cuts, cls.cache_pruning)
    if cls.stage == "llm" or own != (Strategy.cuts, Strategy.cache_pruning):
        found.append("llm")
    return found
