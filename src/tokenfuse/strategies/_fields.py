"""Options that mean the same in several strategies: their types, bounds and descriptions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

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
