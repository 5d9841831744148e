"""What strategies that are made of strategies share."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from pydantic import ValidationInfo

from tokenfuse.strategies._base import Strategy

PART = [{"type": "string"}, {"type": "object"}]
"""JSON Schemas of what a part may be given as: a name, preset or file, or a mapping."""

_loading = ContextVar("tokenfuse_parts_loading", default=False)


def load_part(part: Any, info: ValidationInfo, *place: int) -> Any:
    """The strategy that ``part`` describes, loaded by what the configuration came with.

    ``place``: where it stands in the list of its field, for messages. Raises ValueError where files
    lead back to themselves.
    """
    load = (info.context or {}).get("load")
    if load is None:
        return part
    outermost = not _loading.get()
    token = _loading.set(True)
    try:
        return load(part, info.field_name, *place)
    except RecursionError:
        # Every part on the way here is out of room to explain it, except the first.
        if not outermost:
            raise
        raise ValueError("it leads back to itself; remove the part that does") from None
    finally:
        _loading.reset(token)


def check_part(part: Strategy) -> None:
    """Raise ValueError unless a strategy can be part of another."""
    for option in part.about_prompts():
        raise ValueError(
            f"{part.name} sets {option}; set it at the top of the configuration instead"
        )
    if part.stage != "pre_llm":
        raise ValueError(
            f"{part.name} acts at stage {part.stage}; expected a strategy of stage pre_llm"
        )
    if part.for_modality("image") is not part or part.for_modality("video") is not part:
        raise ValueError(
            f"{part.name} chooses by modality, which only the top of a configuration can; put one "
            "of its strategies here instead"
        )
