"""The answers of one model as JSON Lines, one task under one setting a line.

A line is written as soon as its answers are there, so that a run that was killed goes on where it
stopped. A line that was cut short does not count and is removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tokenfuse.bench.paired import Right
from tokenfuse.errors import ConfigError
from tokenfuse.inference.json_lines import JsonLines


class Header(BaseModel):
    """What has to agree for answers to stand in one file. ``sha256`` is of the model's weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    sha256: str
    questions: int
    patches: int
    seed: int
    device: str
    dtype: str
    versions: dict[str, str]


class Clips(BaseModel):
    """The clips of one task by motion: measured displacements in tokens per temporal patch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    displacement: dict[str, list[float]]


class Answers(BaseModel):
    """One task under one setting, by motion.

    ``right``: a 1 or 0 per question; ``tokens``: visual tokens that are left, of all its clips.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    setting: str
    right: dict[str, str]
    tokens: dict[str, int]


class Described(BaseModel):
    """The configuration that a setting's key stands for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    setting: str
    config: dict[str, Any]


Line = Header | Clips | Answers | Described


class Records:
    """A file of answers, read whole and written by appending.

    Raises ConfigError where the file is of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header | None = None
        self.clips: dict[str, Clips] = {}
        self.answers: dict[tuple[str, str], Answers] = {}
        self.described: dict[str, dict[str, Any]] = {}
        self._file = JsonLines(path)
        for number, text in enumerate(self._file.lines, 1):
            self._take(_parse(text, f"{path}, line {number}"))
        if self._file.lines and self.header is None:
            raise ConfigError(f"{path} has no header: it is no file of this command; move it")

    def begin(self, header: Header) -> None:
        """Say what all answers have in common. Raises ConfigError if the file disagrees."""
        if self.header is None:
            self.append(header)
            return
        for name, value in header:
            held = getattr(self.header, name)
            if held != value:
                raise ConfigError(
                    f"{self.path} holds answers for {name} {held}; this run has {value}: move the "
                    "file to measure anew, or choose another --out"
                )

    def append(self, line: Line) -> None:
        """Add a line, whole or not at all even if the process is killed."""
        self._take(line)
        self._file.add(line.model_dump_json())

    def done(self, task: str, setting: str) -> bool:
        """Whether there are answers to a task under a setting."""
        return (task, setting) in self.answers

    def right(self, task: str, setting: str) -> dict[str, Right]:
        """Whether each answer of a task is right, by motion."""
        given = self.answers[task, setting].right
        return {motion: np.array([c == "1" for c in bits]) for motion, bits in given.items()}

    def _take(self, line: Line) -> None:
        match line:
            case Header():
                if self.header is not None:
                    raise ConfigError(f"{self.path} has two headers; expected one, the first line")
                self.header = line
            case Clips():
                self.clips.setdefault(line.task, line)
            case Described():
                self.described.setdefault(line.setting, line.config)
            case Answers():
                # The first counts: no question is counted twice.
                self.answers.setdefault((line.task, line.setting), line)


def _parse(text: bytes, where: str) -> Line:
    try:
        values: Mapping[str, Any] = json.loads(text)
        kind = next(
            kind
            for kind in (Header, Clips, Answers, Described)
            if set(values) == set(kind.model_fields)
        )
        line: Line = kind.model_validate(values)
        return line
    except (ValueError, ValidationError, StopIteration, TypeError) as error:
        raise ConfigError(
            f"{where} is no record of this command: move the file, or choose another --out"
        ) from error
