"""The scenes of the plain tasks, painted over a background, under any course of the objects.

- ``single``: one object, and a mark that flashes in one patch (``color``, ``shape``, ``flash``,
  and ``direction`` and ``end`` if the object moves);
- ``repeat``: the same, and the mark flashes one to four times in one place;
- ``events``: an object appears, and the mark flashes once before or after it;
- ``order``: two objects of one shape appear one after the other;
- ``count``: one to four objects of one shape.

Objects leave ``paint`` of ``Course`` where they are in the last temporal patch at the places that
are drawn here. What appears does so four patches before the end or earlier, for it has to move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tokenfuse.micro.motion import Course, Positions, between
from tokenfuse.micro.questions import EVENTS, StratumQuestion, StratumTask, ask
from tokenfuse.micro.tasks import (
    COLORS,
    COUNTS,
    FRAMES_PER_PATCH,
    QUADRANTS,
    SHAPES,
    SIZE,
    Float,
    paint_mark,
    places,
)

Scene = Callable[[np.random.Generator, Float, int, Course], Iterator[StratumQuestion]]


def in_quadrant(
    rng: np.random.Generator, quadrant: int, low: float, high: float | None = None
) -> Positions:
    """A place x, y, from ``low`` to ``high`` pixels (or as far from the far side) in a quadrant."""
    half = SIZE / 2
    inside = between(rng, low, half - low if high is None else high, (2,))
    return inside + half * np.array([quadrant % 2, quadrant // 2])


def _single(
    rng: np.random.Generator, video: Float, patches: int, course: Course
) -> Iterator[StratumQuestion]:
    yield from _object(rng, video, course)
    quadrant = _marks(rng, video, rng.integers(patches, size=1).tolist())
    yield ask("flash", QUADRANTS[quadrant])


def _repeat(
    rng: np.random.Generator, video: Float, patches: int, course: Course
) -> Iterator[StratumQuestion]:
    yield from _object(rng, video, course)
    count = int(rng.integers(1, 5))
    # Any choice of places in a row without the dark patches between flashes; then those go in.
    slots = np.sort(rng.permutation(patches - count + 1)[:count])
    quadrant = _marks(rng, video, (slots + np.arange(count)).tolist())
    yield ask("repeat", COUNTS[count - 1])
    yield ask("flash", QUADRANTS[quadrant])


def _events(
    rng: np.random.Generator, video: Float, patches: int, course: Course
) -> Iterator[StratumQuestion]:
    times = _two_times(rng, patches)
    first = int(rng.integers(2))
    yield from _object(rng, video, course, begins=times[1 - first])
    quadrant = _marks(rng, video, [times[first]])
    yield ask("events", EVENTS[first])
    yield ask("flash", QUADRANTS[quadrant])


def _order(
    rng: np.random.Generator, video: Float, patches: int, course: Course
) -> Iterator[StratumQuestion]:
    times = _two_times(rng, patches)
    first, last = (tuple(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
    shape = SHAPES[rng.integers(len(SHAPES))]
    radius = 10 + 3 * rng.random()
    for color, begins, place in zip((first, last), times, places(rng, 2, radius), strict=True):
        course.paint(video, shape, color, place, radius, begins)
    quadrant = _marks(rng, video, rng.integers(patches, size=1).tolist())
    yield ask("order", first)
    yield ask("order", last, form=1)
    yield ask("shape", shape, form=1)
    yield ask("flash", QUADRANTS[quadrant])


def _count(
    rng: np.random.Generator, video: Float, patches: int, course: Course
) -> Iterator[StratumQuestion]:
    count = int(rng.integers(1, 5))
    shape = SHAPES[rng.integers(len(SHAPES))]
    radius = 10 + 3 * rng.random()
    # One velocity for all: they keep their distances, also around the edges, and never overlap.
    for place in places(rng, count, radius):
        course.paint(video, shape, tuple(COLORS)[rng.integers(len(COLORS))], place, radius)
    quadrant = _marks(rng, video, rng.integers(patches, size=1).tolist())
    yield ask("count", COUNTS[count - 1])
    yield ask("shape", shape, form=1)
    yield ask("flash", QUADRANTS[quadrant])


SCENES: dict[StratumTask, Scene] = {
    "color": _single,
    "shape": _single,
    "direction": _single,
    "flash": _single,
    "end": _single,
    "repeat": _repeat,
    "events": _events,
    "order": _order,
    "count": _count,
}


def _object(
    rng: np.random.Generator, video: Float, course: Course, begins: int = 0
) -> Iterator[StratumQuestion]:
    color = tuple(COLORS)[rng.integers(len(COLORS))]
    shape = SHAPES[rng.integers(len(SHAPES))]
    radius = 10 + 3 * rng.random()
    quadrant = int(rng.integers(4))
    # As far from the middle as a fast object comes within the last patch, and whole.
    course.paint(video, shape, color, in_quadrant(rng, quadrant, 17, 34), radius, begins)
    yield ask("color", color)
    yield ask("shape", shape)
    if course.direction is not None:
        yield ask("direction", course.direction)
        yield ask("end", QUADRANTS[quadrant])


def _marks(rng: np.random.Generator, video: Float, lit: list[int]) -> int:
    """Flash the mark in temporal patches ``lit`` at one place; return its quadrant."""
    quadrant = int(rng.integers(4))
    x, y = in_quadrant(rng, quadrant, 12)
    for patch in lit:
        first = FRAMES_PER_PATCH * patch
        paint_mark(video[first : first + FRAMES_PER_PATCH], x, y)
    return quadrant


def _two_times(rng: np.random.Generator, patches: int) -> tuple[int, int]:
    """Two temporal patches, a quarter of the clip apart and four before its end, or more."""
    gap = max(1, patches // 4)
    last = max(gap, patches - 4)
    begins = int(rng.integers(last - gap + 1))
    return begins, int(rng.integers(begins + gap, last + 1))
