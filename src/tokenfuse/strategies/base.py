"""What every strategy is: a validated configuration that makes a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tokenfuse.plan import FusionPlan
from tokenfuse.tokens import Grid, VisualTokens

Stage = Literal["vision", "pre_llm", "llm"]
Need = Literal["saliency", "text"]


@dataclass(frozen=True, eq=False)
class Compressed:
    """What is left of one item: features ``(M, D)``, coords ``(M, 3)``, sizes ``(M,)``, plan."""

    features: Float[Tensor, "M D"]
    coords: Int[Tensor, "M 3"]
    sizes: Int[Tensor, " M"]
    plan: FusionPlan


class Strategy(BaseModel, ABC):
    """Decides which visual tokens survive.

    A subclass declares its options as pydantic fields, sets ``name`` and writes ``plan``. It sees
    tokens, never a model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    """What configurations call it."""
    stage: ClassVar[Stage] = "pre_llm"
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What the adapter must supply beside features."""

    positions: Literal["keep", "contiguous"] = Field(
        "keep",
        description="keep: survivors and all that follows keep the positions of the uncompressed "
        "prompt; contiguous: renumber without gaps, for comparison",
    )

    @abstractmethod
    def plan(self, tokens: VisualTokens) -> FusionPlan:
        """The plan for one item."""

    def fuse(self, plan: FusionPlan, x: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
        """Apply ``plan`` to the features, or to one layer's DeepStack features."""
        return plan.fuse(x)

    def compress(self, tokens: VisualTokens) -> Compressed:
        """Tokens and positions in, fewer tokens and their positions out."""
        plan = self.plan(tokens)
        return Compressed(
            self.fuse(plan, tokens.features), plan.select(tokens.coords), plan.sizes, plan
        )

    def num_kept(self, grid: Grid) -> int | None:
        """Survivors of an item of this grid, or None where the count depends on the content."""
        return None

    def matching_flops(self, grid: Grid, width: int) -> int:
        """Multiply-adds spent on comparing tokens of this grid and feature width."""
        return 0

    def describe(self) -> dict[str, Any]:
        """The configuration that makes this strategy again, ``{"strategy": name, ...}``."""
        return {"strategy": self.name, **self.model_dump(mode="json")}
