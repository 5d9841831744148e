"""What strategies that are made of strategies share."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationInfo

from tokenfuse.strategies._base import Strategy
from tokenfuse.tokens import Modality

SILENT = "{name} acts at stage llm, and has neither cuts nor cache_pruning; expected one of them"
"""What is said of a strategy that says nothing."""
PART = [{"type": "string"}, {"type": "object"}]
"""JSON Schemas of what a part may be given as: a name, preset or file, or a mapping."""


def load_part(part: Any, info: ValidationInfo, *place: int) -> Any:
    """The strategy that ``part`` describes, loaded by what the configuration came with.

    ``place``: where it stands in the list of its field, for messages.
    """
    load = (info.context or {}).get("load")
    return part if load is None else load(part, info.field_name, *place)


def check_part(part: Strategy) -> None:
    """Raise ValueError unless a strategy can be part of another."""
    if part.stage == "vit":
        raise ValueError(
            f"{part.name} acts at stage {part.stage}; expected a strategy of stage pre_llm or llm"
        )
    if part.stage == "llm" and not part.cuts() and part.cache_pruning() is None:
        raise ValueError(SILENT.format(name=part.name))
    if len({id(part.for_modality(modality)) for modality in get_args(Modality)}) > 1:
        raise ValueError(
            f"{part.name} chooses by modality, which only the top of a configuration can; put one "
            "of its strategies here instead"
        )
