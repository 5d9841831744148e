"""Options that mean the same in several strategies: their types, bounds and descriptions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

KeepRatio = Annotated[float, Field(gt=0, le=1, description="share of tokens to keep, exactly")]
"""For a strategy that always has a budget, with a default of its own."""

VisionBlock = Annotated[
    int, Field(description="vision block whose attention is read; negative from the last")
]

Neighbours = Annotated[
    int,
    Field(
        ge=1,
        lt=2**31,
        description="nearest neighbours that tell how dense a point's surroundings are",
    ),
]
"""For density-peaks clustering."""

Seed = Annotated[int, Field(ge=0, lt=2**63, description="seed of the draw")]


def one_or_more(item: dict[str, Any]) -> WithJsonSchema:
    """The JSON Schema of a value that ``as_tuple`` takes, of items with this schema."""
    several = {"type": "array", "items": item, "minItems": 1}
    return WithJsonSchema({"anyOf": [item, several]})


def as_tuple(value: Any) -> Any:
    """A number, or a list of numbers, as a tuple; anything else as it is, for pydantic to refuse.

    YAML and JSON have lists, and to JSON Schema 3.0 is an integer.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, list | tuple):
        return value
    return tuple(int(x) if isinstance(x, float) and x.is_integer() else x for x in value)
