"""Synthetic video questions: a seeded, deterministic generator.

A clip is a textured background, sensor noise and one of three scenes:

- ``motion``: one object crosses the picture, a mark flashes in one quadrant
  (questions ``color``, ``shape``, ``direction``, ``flash``);
- ``order``: two still objects of one shape and different colours appear one after the other,
  and a mark flashes (``order``, ``shape``, ``flash``);
- ``count``: one to four still objects of one shape, and a mark flashes (``count``, ``shape``,
  ``flash``).

The mark is visible for exactly one temporal patch. The same ``(split, seed, patches)``
always renders the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tokenfuse.inference.video import Video

Task = Literal["color", "shape", "direction", "flash", "order", "count"]
Scene = Literal["motion", "order", "count"]
Split = Literal["train", "test"]

TASKS: tuple[Task, ...] = get_args(Task)
SCENES: tuple[Scene, ...] = get_args(Scene)
SCENE_OF: dict[Task, Scene] = {
    "color": "motion",
    "shape": "motion",
    "direction": "motion",
    "flash": "motion",
    "order": "order",
    "count": "count",
}

SIZE = 96
FRAMES_PER_PATCH = 2
HELD_OUT_PATCHES = range(4, 9)
"""Lengths of held-out clips, in temporal patches."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (30, 190, 50),
    "blue": (45, 70, 235),
    "yellow": (240, 225, 40),
    "purple": (170, 40, 200),
    "cyan": (40, 215, 225),
}
SHAPES = ("square", "diamond", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three", "four")
QUESTIONS: dict[Task, tuple[str, ...]] = {
    "color": ("What color is the moving object?",),
    "shape": ("What shape is the moving object?", "What shape are the objects?"),
    "direction": ("In which direction does the object move?",),
    "flash": ("In which corner does the mark flash?",),
    "order": ("Which color appears first?", "Which color appears last?"),
    "count": ("How many objects are there?",),
}
ANSWERS: dict[Task, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "flash": QUADRANTS,
    "order": tuple(COLORS),
    "count": COUNTS,
}

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    task: Task
    text: str
    answer: str


@dataclass(frozen=True)
class Clip:
    """``frames``: uint8 ``(F, 96, 96, 3)`` RGB, ``F = 2 * patches``; ``fps`` per second."""

    frames: npt.NDArray[np.uint8]
    fps: float
    scene: Scene
    questions: tuple[Question, ...]

    @property
    def video(self) -> Video:
        return Video.from_frames(self.frames, self.fps)


def make_clip(
    seed: int,
    *,
    patches: int = 8,
    scene: Scene | None = None,
    split: Split = "train",
    flash: int = 1,
) -> Clip:
    """Render a clip of ``patches`` temporal patches; the mark lasts ``flash`` of them.

    Raises ValueError where there are too few patches: two things in order need two.
    """
    rng = np.random.default_rng([("train", "test").index(split), patches, seed])
    if scene is None:
        scene = SCENES[rng.integers(len(SCENES))]
    least = max(flash, 2 if scene == "order" else 1)
    if patches < least:
        raise ValueError(
            f"{patches} patches are too few for scene {scene}; expected {least} or more"
        )
    frames = FRAMES_PER_PATCH * patches
    video = np.broadcast_to(_background(rng), (frames, SIZE, SIZE, 3)).copy()
    questions = list(_SCENES[scene](rng, video, patches))
    questions.append(_flash(rng, video, patches, flash))
    sigma = rng.uniform(3, 9)
    video += np.float32(sigma) * rng.standard_normal(video.shape, dtype=np.float32)
    pixels = np.clip(video, 0, 255).astype(np.uint8)
    return Clip(pixels, float(rng.choice((4.0, 8.0))), scene, tuple(questions))


def held_out(task: Task, count: int) -> list[tuple[Clip, Question]]:
    """``count`` questions of one task about clips that training never sees, sorted by length.

    The clips have HELD_OUT_PATCHES temporal patches, as many of each length as can be.
    """
    found = []
    share, rest = divmod(count, len(HELD_OUT_PATCHES))
    for patches in HELD_OUT_PATCHES:
        for seed in range(share + (patches - HELD_OUT_PATCHES[0] < rest)):
            clip = make_clip(seed, patches=patches, scene=SCENE_OF[task], split="test")
            asked = [q for q in clip.questions if q.task == task]
            found.append((clip, asked[seed % len(asked)]))
    return found


def _background(rng: np.random.Generator) -> Float:
    """Smooth blotches plus fine grain, ``(96, 96, 3)`` in 0..255."""
    coarse = rng.uniform(-35, 35, (7, 7, 1)) + rng.uniform(-10, 10, (7, 7, 3))
    at = np.linspace(0, 6, SIZE)
    low = np.minimum(at.astype(int), 5)
    part = (at - low)[:, None, None]
    rows = coarse[low] * (1 - part) + coarse[low + 1] * part
    rows = rows.transpose(1, 0, 2)
    smooth = (rows[low] * (1 - part) + rows[low + 1] * part).transpose(1, 0, 2)
    grain = rng.normal(0, 7, (SIZE, SIZE, 1))
    picture: Float = (rng.uniform(80, 135) + smooth + grain).astype(np.float32)
    return picture


_AXIS = np.arange(SIZE, dtype=np.float32) + 0.5


def paint(
    video: Float,
    shape: str,
    color: tuple[int, int, int],
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    radius: float,
) -> None:
    """Draw a shape into ``(F, 96, 96, 3)`` in place, its centres ``x`` and ``y`` of ``(F,)``."""
    cx = np.asarray(x, np.float32).reshape(-1, 1)
    cy = np.asarray(y, np.float32).reshape(-1, 1)
    reach = 1.25 * radius + 1
    across = slice(max(0, int(cx.min() - reach)), int(cx.max() + reach) + 1)
    down = slice(max(0, int(cy.min() - reach)), int(cy.max() + reach) + 1)
    dx = np.abs(_AXIS[across] - cx)[:, None, :]
    dy = np.abs(_AXIS[down] - cy)[:, :, None]
    r = np.float32(radius)
    if shape == "square":
        inside = r - np.maximum(dx, dy)
    elif shape == "diamond":
        inside = (r * np.float32(1.25) - (dx + dy)) / np.float32(1.4)
    elif shape == "cross":
        bar = r * np.float32(0.38)
        inside = np.maximum(np.minimum(r - dx, bar - dy), np.minimum(r - dy, bar - dx))
    else:
        raise ValueError(f"shape {shape!r} is not one of {SHAPES}")
    alpha = np.clip(inside + np.float32(0.5), 0, 1)[..., None]
    box = video[:, down, across]
    box += alpha * (np.asarray(color, np.float32) - box)


def paint_mark(lit: Float, x: float, y: float) -> None:
    """Draw the mark that flashes, 22 pixels wide, into the frames ``lit`` in place."""
    paint(lit, "square", (0, 0, 0), x, y, 11)
    paint(lit, "square", (255, 255, 255), x, y, 8)


def _motion(rng: np.random.Generator, video: Float, patches: int) -> Iterator[Question]:
    color = str(rng.choice(list(COLORS)))
    shape = str(rng.choice(SHAPES))
    direction = str(rng.choice(list(DIRECTIONS)))
    radius = rng.uniform(10, 13)
    length = rng.uniform(28, 66)
    step = np.asarray(DIRECTIONS[direction], np.float64)
    low = np.full(2, radius + 2) + length * (step < 0)
    high = np.full(2, SIZE - radius - 2) - length * (step > 0)
    start = rng.uniform(low, high)
    path = start + np.linspace(0, length, 2 * patches)[:, None] * step
    paint(video, shape, COLORS[color], path[:, 0], path[:, 1], radius)
    yield _ask("color", color)
    yield _ask("shape", shape)
    yield _ask("direction", direction)


def places(rng: np.random.Generator, count: int, radius: float) -> npt.NDArray[np.float64]:
    """Centres of ``count`` objects that do not overlap, one per cell of a 3 × 3 layout."""
    cells = rng.permutation(9)[:count]
    corner = np.stack([cells % 3, cells // 3], 1) * (SIZE / 3)
    slack = SIZE / 6 - radius - 1
    centres: npt.NDArray[np.float64] = corner + SIZE / 6 + rng.uniform(-slack, slack, (count, 2))
    return centres


def _order(rng: np.random.Generator, video: Float, patches: int) -> Iterator[Question]:
    first, last = (str(c) for c in rng.permutation(list(COLORS))[:2])
    gap = max(1, patches // 4)
    begins = int(rng.integers(0, patches - gap))
    then = int(rng.integers(begins + gap, patches))
    radius = rng.uniform(10, 13)
    shape = str(rng.choice(SHAPES))
    for color, patch, (x, y) in zip(
        (first, last), (begins, then), places(rng, 2, radius), strict=True
    ):
        paint(video[FRAMES_PER_PATCH * patch :], shape, COLORS[color], x, y, radius)
    yield Question("order", QUESTIONS["order"][0], first)
    yield Question("order", QUESTIONS["order"][1], last)
    yield Question("shape", QUESTIONS["shape"][1], shape)


def _count(rng: np.random.Generator, video: Float, patches: int) -> Iterator[Question]:
    count = int(rng.integers(1, 5))
    radius = rng.uniform(10, 13)
    shape = str(rng.choice(SHAPES))
    for x, y in places(rng, count, radius):
        color = str(rng.choice(list(COLORS)))
        paint(video, shape, COLORS[color], x, y, radius)
    yield _ask("count", COUNTS[count - 1])
    yield Question("shape", QUESTIONS["shape"][1], shape)


def _flash(rng: np.random.Generator, video: Float, patches: int, lasts: int) -> Question:
    quadrant = int(rng.integers(4))
    begins = int(rng.integers(patches - lasts + 1))
    x, y = rng.uniform(12, SIZE / 2 - 12, 2) + (SIZE / 2) * np.array([quadrant % 2, quadrant // 2])
    lit = video[FRAMES_PER_PATCH * begins : FRAMES_PER_PATCH * (begins + lasts)]
    paint_mark(lit, x, y)
    return _ask("flash", QUADRANTS[quadrant])


def _ask(task: Task, answer: str) -> Question:
    return Question(task, QUESTIONS[task][0], answer)


_SCENES = {"motion": _motion, "order": _order, "count": _count}
