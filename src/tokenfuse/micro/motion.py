"""The motion axis: camera, cuts, light and the courses of objects.

Objects and marks are fixed to the camera, not to the scene: the camera follows them and the
background passes behind. All questions are about places and directions in the picture; an object
of the scene would leave a fast pan's picture within three patches and move as the camera does.
So a pan changes the background and nothing else, and ``slow`` and ``fast`` the objects and nothing
else. A torus for a picture keeps an object in sight: it leaves at one side and enters at the other.

The draws are the same for every motion, so clips of one seed have the same objects and answers
under all of them. Speeds are in tokens (16 pixels) per temporal patch (two frames).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tokenfuse.micro.tasks import COLORS, DIRECTIONS, FRAMES_PER_PATCH, SIZE, Float, paint

Motion = Literal["still", "slow", "fast", "pan_slow", "pan_medium", "pan_fast", "cut", "flicker"]
MOTIONS: tuple[Motion, ...] = get_args(Motion)

TOKEN = 16
"""Pixels of a visual token, in width and height."""

SPEEDS: dict[Motion, tuple[float, float]] = {
    "slow": (0.2, 0.45),
    "fast": (1.1, 1.45),
    "pan_slow": (0.2, 0.45),
    "pan_medium": (0.55, 0.95),
    "pan_fast": (1.1, 1.45),
}
CANVAS = 192
"""Period of the background in pixels: twice the frame, so no frame shows a place twice."""

Positions = npt.NDArray[np.float64]


def between(rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...]) -> Positions:
    """Uniform numbers, from ``Generator.random``: the same in every release of numpy."""
    return low + (high - low) * rng.random(shape)


def canvas(rng: np.random.Generator) -> Float:
    """A background without borders: blotches and grain, ``(192, 192, 3)`` in 0..255."""
    knots = CANVAS // TOKEN
    coarse = between(rng, -35, 35, (knots, knots, 1)) + between(rng, -10, 10, (knots, knots, 3))
    at = np.arange(CANVAS) / TOKEN
    low = at.astype(int)
    high = (low + 1) % knots
    part = (at - low)[:, None, None]
    rows = (coarse[low] * (1 - part) + coarse[high] * part).transpose(1, 0, 2)
    smooth = (rows[low] * (1 - part) + rows[high] * part).transpose(1, 0, 2)
    # Grain of two pixels: of one, it would fade and return as a pan passes half pixels.
    grain = rng.standard_normal((CANVAS, CANVAS, 1))
    for axis in (0, 1):
        grain = (grain + np.roll(grain, 1, axis)) / np.sqrt(2)
    picture: Float = (80 + 55 * rng.random() + smooth + 7 * grain).astype(np.float32)
    return picture


def view(picture: Float, corner: Positions) -> Float:
    """What a camera with its corners ``(F, 2)`` at pixels x, y sees: ``(F, 96, 96, 3)``."""
    span = np.arange(SIZE + 1)
    seen = np.empty((len(corner), SIZE, SIZE, 3), np.float32)
    for frame, at in zip(seen, corner, strict=True):
        x, y = (int(c) for c in np.floor(at))
        right, down = (np.float32(c) for c in at - np.floor(at))
        part = picture[((y + span) % CANVAS)[:, None], (x + span) % CANVAS]
        rows = part[:-1] + down * (part[1:] - part[:-1])
        frame[:] = rows[:, :-1] + right * (rows[:, 1:] - rows[:, :-1])
    return seen


def backdrop(motion: Motion, rng: np.random.Generator, patches: int) -> Float:
    """The background of every frame, ``(F, 96, 96, 3)``, with its pan or its one or two cuts."""
    first, step, share = canvas(rng), _step(rng), rng.random()
    frames = FRAMES_PER_PATCH * patches
    if motion.startswith("pan"):
        pixels = _pixels_per_frame(motion, share)
        return view(first, pixels * np.arange(frames)[:, None] * step)
    seen = np.broadcast_to(first[:SIZE, :SIZE], (frames, SIZE, SIZE, 3)).copy()
    if motion == "cut":
        for cut in np.sort(rng.permutation(patches - 1)[: 1 + rng.integers(2)]) + 1:
            seen[FRAMES_PER_PATCH * cut :] = canvas(rng)[:SIZE, :SIZE]
    return seen


def relight(motion: Motion, rng: np.random.Generator, video: Float) -> None:
    """Let the light of ``video`` drift and flicker in place: ``gain * pixel + offset`` a frame."""
    frames = len(video)
    turns, phase = 0.5 + rng.random(), rng.random()
    # A rounded triangle wave: a sine may differ in its last bit from machine to machine.
    wave = 1 - 4 * np.abs((phase + turns * np.arange(frames) / frames) % 1 - 0.5)
    swing = wave * (1.5 - 0.5 * wave * wave)
    gain = 1 + 0.12 * swing + 0.04 * rng.standard_normal(frames)
    offset = 8 * swing + 3 * rng.standard_normal(frames)
    if motion == "flicker":
        video *= gain.astype(np.float32)[:, None, None, None]
        video += offset.astype(np.float32)[:, None, None, None]


@dataclass(frozen=True)
class Course:
    """Where the objects of a clip are, all with one velocity.

    ``offset``: ``(F, 2)`` pixels x, y from the place in the middle of the last temporal patch.
    ``direction`` is None for objects that stand still.
    """

    direction: str | None
    offset: Positions

    def paint(
        self,
        video: Float,
        shape: str,
        color: str,
        place: npt.ArrayLike,
        radius: float,
        begins: int = 0,
    ) -> None:
        """Draw an object that ends at ``place`` (x, y) into ``(F, 96, 96, 3)``.

        It is there from the temporal patch ``begins`` on.
        """
        first = FRAMES_PER_PATCH * begins
        path = np.asarray(place, np.float64) + self.offset[first:]
        if self.direction is None:
            paint(video[first:], shape, COLORS[color], path[:, 0], path[:, 1], radius)
            return
        axis = int(np.argmax(np.abs(DIRECTIONS[self.direction])))
        path[:, axis] %= SIZE
        reach = 1.25 * radius + 1
        for turn in (-SIZE, 0, SIZE):
            centre = path[:, axis] + turn
            seen = np.flatnonzero((centre > -reach) & (centre < SIZE + reach))
            if len(seen):
                at = path[seen]
                at[:, axis] = centre[seen]
                part = video[first + seen]
                paint(part, shape, COLORS[color], at[:, 0], at[:, 1], radius)
                video[first + seen] = part


def course(motion: Motion, rng: np.random.Generator, patches: int) -> Course:
    """A steady course of the motion's speed to the left, right, top or bottom."""
    frames = FRAMES_PER_PATCH * patches
    direction = tuple(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
    share = rng.random()
    if motion not in ("slow", "fast"):
        return Course(None, np.zeros((frames, 2)))
    until = np.arange(frames) - (frames - (FRAMES_PER_PATCH + 1) / 2)
    step = np.asarray(DIRECTIONS[direction], np.float64)
    return Course(direction, _pixels_per_frame(motion, share) * until[:, None] * step)


def _step(rng: np.random.Generator) -> Positions:
    return np.asarray(tuple(DIRECTIONS.values())[rng.integers(len(DIRECTIONS))], np.float64)


def _pixels_per_frame(motion: Motion, share: float) -> float:
    low, high = SPEEDS[motion]
    return (low + (high - low) * share) * TOKEN / FRAMES_PER_PATCH
