"""Questions that only a small difference between frames answers.

Four objects (bars in ``gap``), one in each quadrant, all drawn alike; in one quadrant something
changes, and the question is where. What its ``size`` counts, and where the difference is, the
``decisive`` temporal patches:

| task | what happens | size | decisive |
| --- | --- | --- | --- |
| ``hue`` | the hue of the object turns, for good | degrees | from the turn to the end |
| ``patch`` | a white square on the bare background | its side, pixels | one patch |
| ``gap`` | a gap opens in the bar | its width, pixels | one patch |
| ``drift`` | the object moves | pixels per patch | all but the first |
| ``vanish`` | the object is gone | width of all objects, pixels | one patch |

A single decisive patch is neither the first nor the last. All other frames are those of a clip
without the difference, bit for bit. Hues come from the whole circle, and places from all of the
quadrant: a turned hue or the end of a drift looks like any other, so these two need an earlier
frame as well.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

from tokenfuse.micro.motion import Positions
from tokenfuse.micro.questions import StratumTask
from tokenfuse.micro.scenes import in_quadrant
from tokenfuse.micro.tasks import DIRECTIONS, FRAMES_PER_PATCH, SHAPES, SIZE, Float, paint

SIZES: dict[StratumTask, tuple[float, float, float]] = {
    "hue": (1, 60, 180),
    "patch": (1, 8, 16),
    "gap": (1, 4, 16),
    "drift": (0.25, 2, 8),
    "vanish": (4, 16, 24),
}
"""Least, default and greatest size of a task."""

WHOLE: tuple[StratumTask, ...] = ("patch", "gap")
"""Tasks whose size is whole pixels."""

RADIUS = 8.0
PATCH = 8
BAR = (34, 8)

Change = Callable[[np.random.Generator, Float, int, int, float, bool], tuple[int, int]]


def change(
    task: StratumTask,
    rng: np.random.Generator,
    video: Float,
    patches: int,
    quadrant: int,
    size: float,
    decisive: bool,
) -> tuple[int, int]:
    """Paint the scene of a task; return its decisive patches, first and past the last.

    The draws depend neither on ``quadrant`` nor on ``size``; without ``decisive`` nothing changes.
    """
    return _CHANGES[task](rng, video, patches, quadrant, size, decisive)


def _hue(
    rng: np.random.Generator, video: Float, patches: int, quadrant: int, size: float, decisive: bool
) -> tuple[int, int]:
    begins = int(rng.integers(1, patches))
    hues, turn = rng.random(4), (size / 360) * (1, -1)[rng.integers(2)]
    shape, cut = SHAPES[rng.integers(len(SHAPES))], FRAMES_PER_PATCH * begins
    for here in range(4):
        x, y = in_quadrant(rng, here, 14)
        after = hues[here] + turn * (decisive and here == quadrant)
        paint(video[:cut], shape, _rgb(hues[here]), x, y, RADIUS)
        paint(video[cut:], shape, _rgb(after), x, y, RADIUS)
    return begins, patches


def _patch(
    rng: np.random.Generator, video: Float, patches: int, quadrant: int, size: float, decisive: bool
) -> tuple[int, int]:
    begins = _one_patch(rng, patches)
    hues, shape = rng.random(4), SHAPES[rng.integers(len(SHAPES))]
    centres = [in_quadrant(rng, here, 14) for here in range(4)]
    for centre, hue in zip(centres, hues, strict=True):
        paint(video, shape, _rgb(hue), centre[0], centre[1], RADIUS)
    # On the grid of the tower's patches, and off the object, whose colour might hide it.
    grid = np.arange(0, SIZE // 2 - int(size) + 1, PATCH)
    corner = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2) + (SIZE // 2) * np.array(
        [quadrant % 2, quadrant // 2]
    )
    away = np.abs(corner + size / 2 - centres[quadrant]).max(-1)
    free = corner[away >= np.minimum(away.max(), 1.25 * RADIUS + 1 + size / 2)]
    x, y = (int(c) for c in free[int(rng.random() * len(free))])
    if decisive:
        video[_frames(begins), y : y + int(size), x : x + int(size)] = 255
    return begins, begins + 1


def _gap(
    rng: np.random.Generator, video: Float, patches: int, quadrant: int, size: float, decisive: bool
) -> tuple[int, int]:
    begins, wide = _one_patch(rng, patches), int(size)
    length, width = BAR
    for here in range(4):
        color, upright = _rgb(rng.random()), bool(rng.integers(2))
        # Draw a bar that lies down; one that stands is the same in the transposed picture.
        picture = video.swapaxes(1, 2) if upright else video
        row, col = (here % 2, here // 2) if upright else (here // 2, here % 2)
        y = row * SIZE // 2 + int(rng.integers(2, SIZE // 2 - width - 1))
        x = col * SIZE // 2 + int(rng.integers(2, SIZE // 2 - length - 1))
        opens = x + 4 + int(rng.random() * (length - wide - 7))
        opening = picture[_frames(begins), y : y + width, opens : opens + wide]
        bare = opening.copy()
        picture[:, y : y + width, x : x + length] = color
        if decisive and here == quadrant:
            opening[:] = bare
    return begins, begins + 1


def _drift(
    rng: np.random.Generator, video: Float, patches: int, quadrant: int, size: float, decisive: bool
) -> tuple[int, int]:
    hues, shape = rng.random(4), SHAPES[rng.integers(len(SHAPES))]
    # Nothing moves within the first patch, whose two frames show the place it comes from.
    steps = np.maximum(np.arange(FRAMES_PER_PATCH * patches) - (FRAMES_PER_PATCH - 1), 0)
    margin, length = 1.25 * RADIUS + 1.5, size / FRAMES_PER_PATCH * float(steps[-1])
    if 2 * margin + length > SIZE / 2:
        most = longest_drift(patches)
        raise ValueError(
            f"drift of {size} pixels per patch leaves its quadrant within {patches} patches; "
            f"expected {most:.2f} or less"
        )
    for here in range(4):
        step = np.asarray(tuple(DIRECTIONS.values())[rng.integers(4)], np.float64)
        # All begin where they could drift from: the first frame does not tell which one will.
        low = np.full(2, margin) + length * (step < 0)
        high = np.full(2, SIZE / 2 - margin) - length * (step > 0)
        corner = (SIZE / 2) * np.array([here % 2, here // 2])
        start: Positions = corner + low + (high - low) * rng.random(2)
        moves = float(decisive and here == quadrant) * size / FRAMES_PER_PATCH
        path = start + moves * steps[:, None] * step
        paint(video, shape, _rgb(hues[here]), path[:, 0], path[:, 1], RADIUS)
    return 1, patches


def longest_drift(patches: int) -> float:
    """The greatest size of a drift, in pixels per patch, that stays in its quadrant."""
    room = SIZE / 2 - 2 * (1.25 * RADIUS + 1.5)
    return min(SIZES["drift"][2], room / (patches - 1))


def _vanish(
    rng: np.random.Generator, video: Float, patches: int, quadrant: int, size: float, decisive: bool
) -> tuple[int, int]:
    begins = _one_patch(rng, patches)
    hues, shape = rng.random(4), SHAPES[rng.integers(len(SHAPES))]
    for here in range(4):
        x, y = in_quadrant(rng, here, 16.5)
        gone = _frames(begins)
        bare = video[gone].copy()
        paint(video, shape, _rgb(hues[here]), x, y, size / 2)
        if decisive and here == quadrant:
            video[gone] = bare
    return begins, begins + 1


_CHANGES: dict[StratumTask, Change] = {
    "hue": _hue,
    "patch": _patch,
    "gap": _gap,
    "drift": _drift,
    "vanish": _vanish,
}


def _rgb(hue: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(hue % 1, 0.8, 0.9)
    return round(255 * r), round(255 * g), round(255 * b)


def _one_patch(rng: np.random.Generator, patches: int) -> int:
    return int(rng.integers(1, patches - 1))


def _frames(patch: int) -> slice:
    return slice(FRAMES_PER_PATCH * patch, FRAMES_PER_PATCH * (patch + 1))
