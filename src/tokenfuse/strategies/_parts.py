"""What strategies that are made of strategies share."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationInfo

from tokenfuse.strategies._base import Strategy
from tokenfuse.tokens import Modality

PART = [{"type": "string"}, {"type": "object"}]
"""JSON Schemas of what a part may be given as: a name, preset or file, or a mapping."""


def load_part(part: Any, info: ValidationInfo, *place: int) -> Any:
    """The strategy that ``part`` describes, loaded by what the configuration came with.

    ``place``: where it stands in the list of its field, for messages.
    """
    load = (info.context or {}).get("load")
    return part if load is None else load(part, info.field_name, *place)


def silent(strategy: Strategy) -> str | None:
    """What is said of a strategy that says nothing at its own stage; None where it does."""
    if strategy.stage == "llm" and not strategy.cuts() and strategy.cache_pruning() is None:
        expected = "has neither cuts nor cache_pruning; expected one of them"
    elif strategy.stage == "tower" and not (strategy.acts_before_tower or strategy.acts_in_tower):
        expected = "has neither tower_plan nor tower_cuts; expected one of them"
    else:
        return None
    return f"{strategy.name} acts at stage {strategy.stage}, and {expected}"


def check_part(part: Strategy) -> None:
    """Raise ValueError unless a strategy can be part of another."""
    if part.stage == "vit":
        raise ValueError(
            f"{part.name} acts at stage {part.stage}; expected a strategy of stage tower, pre_llm "
            "or llm"
        )
    found = silent(part)
    if found is not None:
        raise ValueError(found)
    if len({id(part.for_modality(modality)) for modality in get_args(Modality)}) > 1:
        raise ValueError(
            f"{part.name} chooses by modality, which only the top of a configuration can; put one "
            "of its strategies here instead"
        )
