"""The strategy: alternate places, shifted from frame to frame."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenfuse import FusionPlan, Strategy, VisualTokens

# Which of (t, h, w) are counted. Time always is, so that the pattern moves.
AXES = {"diagonal": [0, 1, 2], "rows": [0, 1], "columns": [0, 2]}


class Checkerboard(Strategy):
    """Keep every second place, in each frame the other ones: two frames show every place."""

    name: ClassVar[str] = "checkerboard"
    # In a chain after another strategy, places would be missing, and so would the count.
    needs: ClassVar = frozenset({"grid"})

    period: int = Field(2, ge=1, description="one place in so many; so many frames show them all")
    pattern: Literal["diagonal", "rows", "columns"] = Field(
        "diagonal", description="what alternates: single places, whole rows, or whole columns"
    )

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        # Made from the grid on the CPU: nonzero() on a GPU would wait for it.
        survivors = self._kept(tokens.grid).nonzero().flatten()
        return FusionPlan.from_survivors(survivors.to(tokens.features.device), tokens.num_tokens)

    def num_kept(self, grid: tuple[int, int, int]) -> int:
        return int(self._kept(grid).sum())

    def _kept(self, grid: tuple[int, int, int]) -> Tensor:
        """Which places stay, ``(N,)``; the first one always does."""
        index = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        return (index[AXES[self.pattern]].sum(0) % self.period == 0).flatten()
