"""What a strategy sees and says before and inside the vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tokenfuse.errors import PlanError
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._layers import WeighedPlan
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


@dataclass(frozen=True, eq=False)
class TowerTokens:
    """One image or video at the input of a block of the vision tower.

    ``states (V, P, D)``: the hidden states of the ``P`` patches that each of the ``V`` tokens that
    are left will be made of; of a cut of whole ``frames``, those of all patches of each frame that
    is left. In the order of the ``grid``, ``(T, 1, 1)`` of whole frames, whose places are
    ``coords (V, 3)``. ``sizes (V,)``: how many tokens, or frames, each stands for. ``block`` of
    ``num_blocks``: the one that is about to run. ``keys (V, P, d)``: those of the block before,
    mean over heads, before any rotation, where a TowerCut asks for them.
    """

    states: Float[Tensor, "V P D"]
    coords: Int[Tensor, "V 3"]
    sizes: Int[Tensor, " V"]
    grid: Grid
    block: int
    num_blocks: int
    frames: bool = False
    keys: Float[Tensor, "V P d"] | None = None

    @property
    def num_tokens(self) -> int:
        return self.states.shape[0]


@dataclass(frozen=True)
class TowerCut:
    """What a strategy does at the input of one block of the vision tower.

    ``plan``: the plan for what is left of an item there, or None for all. ``frames``: whether it
    drops and merges whole frames, of videos alone. ``keys``: whether the plan reads those of the
    block before. ``proportional``: whether attention weighs a token by the tokens that it stands
    for from there on.

    What is merged becomes the mean of all that it stands for, or that of a WeighedPlan.
    """

    block: int
    plan: Callable[[TowerTokens], FusionPlan | None]
    frames: bool = False
    keys: bool = False
    proportional: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class TowerPlan(FusionPlan):
    """What goes before and inside the tower, and what goes behind it, as one plan.

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


def merged(
    plan: FusionPlan, x: Float[Tensor, "V ..."], sizes: Int[Tensor, " V"]
) -> Float[Tensor, "M ..."]:
    """States after a plan: means weighted by ``sizes``, or as a WeighedPlan says."""
    if plan.drops:
        return plan.select(x)
    weighed = plan if isinstance(plan, WeighedPlan) else None
    if weighed is None:
        weighed = WeighedPlan(plan.survivors, plan.target, sizes.float())
    rows: Tensor = weighed.mean(x.flatten(1)).unflatten(1, x.shape[1:])
    return rows
