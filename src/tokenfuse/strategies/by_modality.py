"""A strategy for videos and another one for images."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

from pydantic import (
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from torch import Tensor

from tokenfuse.errors import PlanError
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Needs, Strategy
from tokenfuse.strategies._parts import PART, check_part, load_part
from tokenfuse.tokens import Grid, Modality, VisualTokens

Part = Annotated[Strategy | None, WithJsonSchema({"anyOf": [*PART, {"type": "null"}]})]


@dataclass(frozen=True, eq=False, repr=False)
class PartPlan(FusionPlan):
    """A plan that remembers the strategy that made it.

    ``part``: that strategy. ``made``: its own plan, by which it fuses.
    """

    part: Strategy
    made: FusionPlan


class ByModality(Strategy):
    """Apply one strategy to videos and another one to images.

    In YAML ``video: ttf`` and ``image: {strategy: visionzip, keep_ratio: 0.5}``, by names, presets,
    files or mappings. A modality that is left out is left as it is.

    In a model's prompt the placeholders say what is an image. On bare tensors an item of one frame
    is an image, and every other item is a video.

    Synchronises with the host as often as its parts do.
    """

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["video"]}, {"required": ["image"]}]}
    )

    name: ClassVar[str] = "by_modality"

    video: Part = Field(None, description="the strategy for videos")
    image: Part = Field(None, description="the strategy for images")

    @field_validator("video", "image", mode="before")
    @classmethod
    def _load(cls, part: Any, info: ValidationInfo) -> Any:
        return None if part is None else load_part(part, info)

    @field_validator("video", "image")
    @classmethod
    def _usable(cls, part: Strategy | None) -> Strategy | None:
        if part is not None:
            check_part(part)
            if part.acts_before_tower or part.acts_in_tower:
                raise ValueError(
                    f"{part.name} acts before or inside the vision tower; put it first in a chain, "
                    "or at the top"
                )
            if part.cuts() or part.cache_pruning():
                raise ValueError(
                    f"{part.name} acts inside the LLM, on all visual tokens of a prompt; put it "
                    "behind by_modality in a chain, or at the top"
                )
        return part

    @model_validator(mode="after")
    def _has_a_part(self) -> ByModality:
        if not self._parts:
            raise ValueError(
                "there is no strategy for videos nor for images; expected one or both, such as "
                "video: ttf"
            )
        return self

    @field_serializer("video", "image")
    def _describe_part(self, part: Strategy | None) -> dict[str, Any] | None:
        return None if part is None else part.describe()

    @property
    def _parts(self) -> list[Strategy]:
        return [part for part in (self.video, self.image) if part is not None]

    def for_modality(self, modality: Modality) -> Strategy | None:
        return self.image if modality == "image" else self.video

    def _for_grid(self, grid: Grid) -> Strategy | None:
        return self.for_modality("image" if grid[0] == 1 else "video")

    def plan(self, tokens: VisualTokens) -> FusionPlan:
        part = self._for_grid(tokens.grid)
        if part is None:
            return FusionPlan.identity(tokens.num_tokens, tokens.features.device)
        made = part.plan(tokens)
        return PartPlan(made.survivors, made.target, part, made, frame_order=made.frame_order)

    def fuse(self, plan: FusionPlan, x: Tensor) -> Tensor:
        if isinstance(plan, PartPlan):
            return plan.part.fuse(plan.made, x)
        if plan.is_identity:
            return plan.fuse(x)
        raise PlanError(
            f"by_modality fuses by the plan that it made; got a {type(plan).__name__}, expected a "
            "PartPlan: fuse with the strategy that made the plan"
        )

    def needed(self) -> Needs:
        """What its parts need together; where they read different vision blocks, the first one's.

        Ask the part of an item's modality instead where the modality is known.
        """
        each = [part.needed() for part in self._parts]
        attention = next((needs.attention for needs in each if needs.attention), None)
        return Needs(attention, any(needs.text for needs in each))

    @property
    def needs_grid(self) -> bool:
        return any(part.needs_grid for part in self._parts)

    def num_kept(self, grid: Grid) -> int | None:
        part = self._for_grid(grid)
        return prod(grid) if part is None else part.num_kept(grid)

    def matching_flops(self, grid: Grid, width: int) -> int:
        part = self._for_grid(grid)
        return 0 if part is None else part.matching_flops(grid, width)
