"""What a picture of kept tokens is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tokenfuse.errors import ConfigError, TokensError

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenfuse.plan import FusionPlan
    from tokenfuse.tokens import Grid

ENDINGS = (".png", ".gif", ".mp4", ".html")
"""Of the files that ``TokenMap.save`` writes."""
MOST = 16
"""Frames that a picture shows, unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Step:
    """A point on the road of the tokens: its ``title``, and which are left there, ``(N,)``."""

    title: str
    kept: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False, repr=False)
class TokenMap:
    """One image or video, and what has become of each of its ``N = T * H * W`` tokens.

    ``frames``: ``(T, height, width, 3)`` uint8, one picture for each frame of the ``grid``.
    ``target``: ``(N,)``, the source index of the survivor that each token belongs to, its own for a
    survivor, -1 where it was dropped. ``steps``: which are left, one or more points on the road.
    ``similarity``: ``(N,)``, the cosine of each fused token with its survivor, NaN for all others.
    ``timestamps``: when each frame is shown, in seconds. ``order``: the frames as they stand in the
    prompt, None for the order of time.
    """

    frames: npt.NDArray[np.uint8]
    grid: Grid
    target: npt.NDArray[np.int64]
    steps: tuple[Step, ...]
    similarity: npt.NDArray[np.float32] | None = None
    timestamps: tuple[float, ...] | None = None
    order: tuple[int, ...] | None = None
    title: str = field(default="", kw_only=True)

    @classmethod
    def from_plan(
        cls, frames: Any, plan: FusionPlan, grid: Grid | None = None, *, title: str = ""
    ) -> TokenMap:
        """The map of one plan.

        ``frames``: ``(T, height, width, 3)``, an array or a tensor, uint8 or floats from 0 to 1.
        ``grid``: of the plan's tokens; if left out, that of square frames.

        Raises TokensError where frames, plan and grid do not fit together.
        """
        pictures = as_pictures(frames)
        shape = grid or _square(len(pictures), plan.num_source)
        if (len(pictures), plan.num_source) != (shape[0], prod(shape)):
            raise TokensError(
                f"{len(pictures)} frames and a plan for {plan.num_source} tokens do not fit a grid "
                f"of {shape}; expected a picture for each frame of the grid, and a plan for all of "
                "its tokens"
            )
        order = None if plan.frame_order is None else tuple(plan.frame_order.tolist())
        step = Step("before the LLM", plan.keep_mask.cpu().numpy())
        return cls(pictures, shape, targets(plan), (step,), order=order, title=title)

    def __repr__(self) -> str:
        left = " -> ".join(str(int(step.kept.sum())) for step in self.steps)
        return f"TokenMap({self.title or 'plan'}: {prod(self.grid)} -> {left} tokens)"

    @property
    def counts(self) -> list[list[int]]:
        """Tokens that are left of each frame, step by step."""
        frames = self.grid[0]
        return [step.kept.reshape(frames, -1).sum(1).tolist() for step in self.steps]

    @property
    def taken_in(self) -> list[int]:
        """How many tokens of other frames were fused into tokens of each frame.

        A frame that takes some in is an anchor.
        """
        per = self.grid[1] * self.grid[2]
        source = np.arange(len(self.target)) // per
        into = np.where(self.target < 0, source, self.target // per)
        found: list[int] = np.bincount(into[into != source], minlength=self.grid[0]).tolist()
        return found

    def chosen(self, most: int | None = MOST) -> list[int]:
        """The frames that a picture shows: all, or ``most`` of them, evenly chosen."""
        count = self.grid[0]
        if most is None or count <= most:
            return list(range(count))
        if most < 1:
            raise ConfigError(f"a picture of {most} frames shows nothing; expected 1 or more")
        return [round(x) for x in np.linspace(0, count - 1, most)]

    def sheet(self, most: int | None = MOST) -> Image:
        """All steps, frame beside frame: what went is dimmed, what is left is outlined."""
        from tokenfuse.pictures._draw import sheet

        return sheet(self, most)

    def animation(self, most: int | None = MOST) -> list[Image]:
        """One picture for each frame, after the last step."""
        from tokenfuse.pictures._draw import animation

        return animation(self, most)

    def page(self, most: int | None = MOST) -> str:
        """A page of its own in HTML, which shows under the pointer where each token went."""
        from tokenfuse.pictures._page import page

        return page(self, most)

    def save(self, path: str | Path, most: int | None = MOST) -> Path:
        """Write a picture; the ending says which: a sheet, an animation, a film or a page.

        Raises ConfigError for another ending.
        """
        target = check_path(path)
        ending = target.suffix.lower()
        if ending == ".html":
            target.write_text(self.page(most), "utf-8")
        elif ending == ".png":
            self.sheet(most).save(target)
        else:
            from tokenfuse.pictures._draw import write_film, write_gif

            write = write_gif if ending == ".gif" else write_film
            write(self, target, most)
        return target

    def _repr_html_(self) -> str:
        from tokenfuse.pictures._page import fragment

        return fragment(self, MOST)


def check_path(path: str | Path) -> Path:
    """The path of a picture. Raises ConfigError for an ending that none has, and for a folder."""
    found = Path(path)
    if found.suffix.lower() not in ENDINGS:
        raise ConfigError(
            f"{path} has no ending of a picture; expected one of {', '.join(ENDINGS)}, such as "
            "kept.png"
        )
    if found.is_dir():
        raise ConfigError(f"{path} is a folder; expected a file")
    if not found.parent.is_dir():
        raise ConfigError(f"{found.parent} is no folder; expected one that is there: make it first")
    return found


def targets(plan: FusionPlan) -> npt.NDArray[np.int64]:
    """The source index of the survivor of each token, -1 where it was dropped."""
    survivors, target = plan.survivors.cpu().numpy(), plan.target.cpu().numpy()
    found: npt.NDArray[np.int64] = np.where(target < 0, -1, survivors[target.clip(0)])
    return found


def as_pictures(frames: Any) -> npt.NDArray[np.uint8]:
    """Frames as uint8 ``(T, height, width, 3)``. Raises TokensError for what is none."""
    values = frames.detach().float().cpu().numpy() if hasattr(frames, "detach") else frames
    values = np.asarray(values)
    if values.ndim != 4 or values.shape[-1] != 3 or not values.size:
        raise TokensError(
            f"frames have the shape {values.shape}; expected (T, height, width, 3), RGB"
        )
    if values.dtype == np.uint8:
        return values
    whole = hasattr(frames, "dtype") and "uint8" in str(frames.dtype)
    if not whole and (not np.isfinite(values).all() or values.min() < 0 or values.max() > 1):
        raise TokensError(
            f"frames hold values from {values.min():g} to {values.max():g}; expected uint8, or "
            "floats from 0 to 1"
        )
    return (values if whole else values * 255).round().astype(np.uint8)


def _square(frames: int, tokens: int) -> Grid:
    """The grid of square frames."""
    side = round((tokens / frames) ** 0.5)
    if frames * side * side != tokens:
        raise TokensError(
            f"{tokens} tokens in {frames} frames are no square grid; expected grid=(T, H, W)"
        )
    return frames, side, side
