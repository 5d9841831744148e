"""What a strategy sees and says before the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tokenfuse.errors import PlanError
from tokenfuse.plan import FusionPlan
from tokenfuse.tokens import Grid


@dataclass(frozen=True, eq=False)
class PixelTokens:
    """One image or video as the vision tower is about to read it.

    ``pixels (N, C, K)``: what each visual token will be made of, by channel, as the processor has
    normalised it, in the order of the ``grid``. ``scale (C,)``: what turns a difference of them
    into one of pixels between 0 and 1.
    """

    pixels: Float[Tensor, "N C K"]
    grid: Grid
    scale: Float[Tensor, " C"]

    @property
    def num_tokens(self) -> int:
        return self.pixels.shape[0]


@dataclass(frozen=True, eq=False, repr=False)
class TowerPlan(FusionPlan):
    """What never enters the tower, and what goes behind it, as one plan.

    ``first``: the plan for all tokens. ``then``: the plan for those that it leaves.
    """

    first: FusionPlan
    then: FusionPlan

    @classmethod
    def of(cls, first: FusionPlan, then: FusionPlan) -> TowerPlan:
        """The two as one."""
        both = first.compose(then)
        return cls(both.survivors, both.target, first, then, frame_order=both.frame_order)


def drops_only(plan: FusionPlan, name: str) -> FusionPlan:
    """A plan of strategy ``name`` before the tower. Raises PlanError where it fuses: one sync."""
    if bool((plan.sizes > 1).any()):
        raise PlanError(
            f"strategy {name} fuses before the vision tower, where tokens are pixels still; "
            "expected a plan that drops"
        )
    return plan
