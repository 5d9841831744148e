"""What the strata ask: task names, questions and answers.

Answers are those of ``tokenfuse.micro.tasks`` except for ``events``. The text of a question is the
same under every motion, so that it says nothing about the clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tokenfuse.micro.tasks import ANSWERS, COUNTS, QUADRANTS, QUESTIONS

PlainTask = Literal[
    "color", "shape", "direction", "flash", "order", "count", "events", "repeat", "end"
]
SubtleTask = Literal["hue", "patch", "gap", "drift", "vanish"]
StratumTask = Literal[PlainTask, SubtleTask]

PLAIN: tuple[PlainTask, ...] = get_args(PlainTask)
SUBTLE: tuple[SubtleTask, ...] = get_args(SubtleTask)

EVENTS = ("flash", "object")

STRATUM_QUESTIONS: dict[StratumTask, tuple[str, ...]] = {
    "color": ("What color is the object?",),
    "shape": ("What shape is the object?", "What shape are the objects?"),
    "direction": QUESTIONS["direction"],
    "flash": QUESTIONS["flash"],
    "order": QUESTIONS["order"],
    "count": QUESTIONS["count"],
    "events": ("Which appears first, the flash or the object?",),
    "repeat": ("How many times does the mark flash?",),
    "end": ("In which corner is the object at the end?",),
    "hue": ("In which corner does the color change?",),
    "patch": ("In which corner does a dot appear?",),
    "gap": ("In which corner does a gap open?",),
    "drift": ("In which corner does the object move?",),
    "vanish": ("In which corner does the object vanish?",),
}
STRATUM_ANSWERS: dict[StratumTask, tuple[str, ...]] = {
    "color": ANSWERS["color"],
    "shape": ANSWERS["shape"],
    "direction": ANSWERS["direction"],
    "flash": QUADRANTS,
    "order": ANSWERS["order"],
    "count": COUNTS,
    "events": EVENTS,
    "repeat": COUNTS,
    "end": QUADRANTS,
    "hue": QUADRANTS,
    "patch": QUADRANTS,
    "gap": QUADRANTS,
    "drift": QUADRANTS,
    "vanish": QUADRANTS,
}


@dataclass(frozen=True)
class StratumQuestion:
    task: StratumTask
    text: str
    answer: str


def ask(task: StratumTask, answer: str, form: int = 0) -> StratumQuestion:
    """A question of a task in one of its forms, with its right answer."""
    return StratumQuestion(task, STRATUM_QUESTIONS[task][form], answer)
