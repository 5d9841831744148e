"""Answers of one model under one setting against its uncompressed answers, by any grouping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenfuse.bench.micro import interval
from tokenfuse.bench.paired import Interval, Right, bootstrap, mcnemar
from tokenfuse.bench.retention.plan import UNCOMPRESSED
from tokenfuse.bench.retention.records import Records
from tokenfuse.config import KEY
from tokenfuse.micro.displacement import Group, group
from tokenfuse.micro.questions import STRATUM_ANSWERS

COUNTED = 0.9
"""A task counts where so many answers are right without compression: else there is little to lose.
"""
GROUPS: tuple[Group, ...] = ("low", "medium", "high")


@dataclass(frozen=True)
class Question:
    """Where a question belongs."""

    task: str
    motion: str
    group: Group


Where = Callable[[Question], bool]


@dataclass(frozen=True)
class Cost:
    """What a setting costs on some questions.

    ``p`` is McNemar's, ``removed`` the share of visual tokens that is gone.
    """

    questions: int
    before: float
    after: float
    retention: Interval
    p: float
    removed: float


class Summary:
    """All answers of one model; what it was not asked under a setting is left out."""

    def __init__(self, records: Records) -> None:
        self.records = records
        # A run that goes on may lack tasks: what is compared has been asked.
        self.tasks = [task for task in records.clips if records.done(task, UNCOMPRESSED)]
        self.counted = [task for task in self.tasks if self.accuracy(task) >= COUNTED]

    @property
    def model(self) -> str:
        return self.records.header.model if self.records.header else ""

    def has(self, setting: str) -> bool:
        """Whether the setting has answers to every task."""
        return all(self.records.done(task, setting) for task in self.tasks)

    def accuracy(self, task: str, setting: str = UNCOMPRESSED) -> float:
        """Share of right answers to a task, NaN where it was not asked."""
        if not self.records.done(task, setting):
            return float("nan")
        return float(np.concatenate([*self.records.right(task, setting).values()]).mean())

    def cost(self, setting: str, where: Where | None = None) -> Cost | None:
        """The cost of a setting over the counted tasks, or over the questions ``where`` names.

        None where it has no answers.
        """
        before: list[Right] = []
        after: list[Right] = []
        shown = left = 0.0
        for task in self.tasks:
            if not self.records.done(task, setting):
                continue
            clips = self.records.clips[task].displacement
            plain, mine = (self.records.right(task, s) for s in (UNCOMPRESSED, setting))
            tokens = [self.records.answers[task, s].tokens for s in (UNCOMPRESSED, setting)]
            for motion, moved in clips.items():
                chosen = np.array(
                    [self._asks(Question(task, motion, group(d)), where) for d in moved]
                )
                before.append(plain[motion][chosen])
                after.append(mine[motion][chosen])
                # Tokens are counted by stratum: a part of it gets its share.
                shown += tokens[0][motion] * chosen.mean()
                left += tokens[1][motion] * chosen.mean()
        if not before or not sum(map(len, before)):
            return None
        was, still = np.concatenate(before), np.concatenate(after)
        return Cost(
            questions=len(was),
            before=float(was.mean()),
            after=float(still.mean()),
            retention=bootstrap(was, still),
            p=mcnemar(was, still),
            removed=1 - left / shown,
        )

    def check(self, check: str, task: str) -> Interval | None:
        """Right answers to a task under a check, with Wilson's interval; None if not asked."""
        if not self.records.done(task, check):
            return None
        right = np.concatenate([*self.records.right(task, check).values()])
        return Interval(float(right.mean()), *interval(int(right.sum()), len(right)))

    def _asks(self, question: Question, where: Where | None) -> bool:
        return question.task in self.counted if where is None else where(question)


def in_group(model: Summary, motion: str) -> Where:
    """The questions of counted tasks whose measured motion is of a group."""
    return lambda q: q.group == motion and q.task in model.counted


def in_stratum(task: str, motion: str | None = None) -> Where:
    """The questions of one task, counted or not, under one motion or under all."""
    return lambda q: q.task == task and motion in (None, q.motion)


def chance(task: str) -> float:
    """Share of right answers of a guess among the answers of a task."""
    return 1 / len(STRATUM_ANSWERS[task])  # type: ignore[index] # records hold plain strings


def label(point: Mapping[str, Any]) -> str:
    """The values of a grid point, such as ``threshold 0.7, window 3``."""
    parts = [f"{key} {value}" for key, value in point.items() if key != KEY]
    return ", ".join(parts)
