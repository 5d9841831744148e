"""Synthetic video questions by stratum: one task, under one motion, of one size if it is subtle.

=========================  =====  ==========  ========  ===  =======
task                       still  slow, fast  pan_...   cut  flicker
=========================  =====  ==========  ========  ===  =======
color shape flash order
count events repeat        yes    yes         yes       yes  yes
direction end              no     yes         slow      slow slow
hue patch gap drift vanish yes    no          yes       yes  yes
=========================  =====  ==========  ========  ===  =======

``slow``: the object of these questions moves slowly before the camera that pans, cuts or flickers.
Elsewhere objects move under ``slow`` and ``fast`` alone. ``python -m tokenfuse.micro.sheet FILE``
draws one clip of each.

The same arguments always make the same bytes. Clips of one task, split, length and seed have the
same objects and the same answer under every motion and in every size, so that strata can be
compared clip by clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenfuse.inference.video import Video
from tokenfuse.micro.displacement import Displacement, Group, group, measure
from tokenfuse.micro.motion import MOTIONS, Motion, backdrop, course, relight
from tokenfuse.micro.questions import PLAIN, SUBTLE, StratumQuestion, StratumTask, ask
from tokenfuse.micro.scenes import SCENES
from tokenfuse.micro.subtle import SIZES, WHOLE, change
from tokenfuse.micro.tasks import QUADRANTS, Split

LEAST = 4
LEAST_FOR: dict[StratumTask, int] = {"repeat": 7}  # four flashes and three dark patches
_STREAM = 20_000  # the first number of the seeds: those of make_clip begin with 0 or 1


def refusal(task: StratumTask, motion: Motion) -> str | None:
    """Why a task makes no sense under a motion; None if it does."""
    if task in ("direction", "end") and motion == "still":
        return "nothing moves in a still clip, so its end is its beginning"
    if task in SUBTLE and motion in ("slow", "fast"):
        return "each object of a subtle clip stays in its quadrant, and only the difference moves"
    return None


@dataclass(frozen=True)
class Stratum:
    """A task under a motion. ``size``: of a subtle difference, in the unit of its task.

    A subtle task without a size takes its default. Raises ValueError for a combination that
    makes no sense, and for a size where there is none or that is out of range.
    """

    task: StratumTask
    motion: Motion
    size: float | None = None

    def __post_init__(self) -> None:
        for what, given, valid in (
            ("task", self.task, (*PLAIN, *SUBTLE)),
            ("motion", self.motion, MOTIONS),
        ):
            if given not in valid:
                raise ValueError(f"{what} {given!r} is not one of {', '.join(valid)}")
        if reason := refusal(self.task, self.motion):
            raise ValueError(f"no {self.task} under {self.motion}: {reason}")
        if self.task not in SUBTLE:
            if self.size is not None:
                raise ValueError(f"{self.task} has no size; only {', '.join(SUBTLE)} have one")
            return
        low, default, high = SIZES[self.task]
        size = default if self.size is None else self.size
        if not low <= size <= high or (self.task in WHOLE and size != int(size)):
            kind = "a whole number" if self.task in WHOLE else "a number"
            raise ValueError(f"size {size} of {self.task} is not {kind} from {low} to {high}")
        object.__setattr__(self, "size", float(size))

    def __str__(self) -> str:
        return f"{self.task}/{self.motion}" + (f"/{self.size:g}" if self.size is not None else "")


STRATA: tuple[Stratum, ...] = tuple(
    Stratum(task, motion)
    for task in (*PLAIN, *SUBTLE)
    for motion in MOTIONS
    if refusal(task, motion) is None
)
"""All combinations that make sense, subtle ones in their default size."""


@dataclass(frozen=True)
class StratumClip:
    """A clip and what is asked about it.

    ``frames``: uint8 ``(F, 96, 96, 3)`` RGB, ``F = 2 * patches``; ``fps`` per second.
    ``question`` is the stratum's, ``questions`` are all that the clip answers, for training.
    ``measured`` from the frames before sensor noise, if at all. ``decisive``: the temporal patches,
    first and past the last, that hold a subtle difference; None in plain strata.
    """

    stratum: Stratum
    frames: npt.NDArray[np.uint8]
    fps: float
    question: StratumQuestion
    questions: tuple[StratumQuestion, ...]
    measured: Displacement | None
    decisive: tuple[int, int] | None

    @property
    def video(self) -> Video:
        return Video.from_frames(self.frames, self.fps)

    @property
    def displacement(self) -> float:
        """Tokens per temporal patch: the median over the blocks that move.

        Raises ValueError for a clip that was made with ``measured=False``.
        """
        if self.measured is None:
            raise ValueError("the clip was not measured; expected one made with measured=True")
        return self.measured.median

    @property
    def group(self) -> Group:
        return group(self.displacement)


def make_stratum_clip(
    stratum: Stratum,
    seed: int,
    *,
    patches: int = 8,
    split: Split = "test",
    decisive: bool = True,
    measured: bool = True,
) -> StratumClip:
    """Render and measure a clip of ``patches`` temporal patches.

    ``decisive=False`` renders a subtle clip without its difference: the same bytes elsewhere.
    ``measured=False`` leaves out the measurement, a third of the time.
    Raises ValueError where there are too few patches, or so many that a drift leaves its quadrant.
    """
    task, motion = stratum.task, stratum.motion
    least = LEAST_FOR.get(task, LEAST)
    if patches < least:
        raise ValueError(f"{patches} patches are too few for {stratum}; expected {least} or more")
    if not decisive and task not in SUBTLE:
        raise ValueError(f"{stratum} has no decisive difference to leave out")
    key = [("train", "test").index(split), patches, (*PLAIN, *SUBTLE).index(task), seed]
    # A stream each, so that neither motion nor size changes what is drawn for the rest.
    scene, camera, light, sensor = (np.random.default_rng([_STREAM + i, *key]) for i in range(4))
    video = backdrop(motion, camera, patches)
    where: tuple[int, int] | None = None
    if stratum.size is not None:
        quadrant = int(scene.integers(4))
        where = change(task, scene, video, patches, quadrant, stratum.size, decisive)
        questions = [ask(task, QUADRANTS[quadrant])]
    else:
        moves: Motion = motion
        if task in ("direction", "end") and motion not in ("slow", "fast"):
            moves = "slow"
        questions = list(SCENES[task](scene, video, patches, course(moves, scene, patches)))
    relight(motion, light, video)
    displacement = measure(video) if measured else None
    fps, sigma, which = (4.0, 8.0)[sensor.integers(2)], 3 + 6 * sensor.random(), sensor.random()
    video += np.float32(sigma) * sensor.standard_normal(video.shape, dtype=np.float32)
    frames = np.clip(video, 0, 255).astype(np.uint8)
    asked = [q for q in questions if q.task == task]
    question = asked[int(which * len(asked))]
    return StratumClip(stratum, frames, fps, question, tuple(questions), displacement, where)
