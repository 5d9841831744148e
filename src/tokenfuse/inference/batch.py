"""Many questions about many videos: JSON Lines in, JSON Lines out, resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenfuse.config import Configuration
from tokenfuse.errors import ConfigError
from tokenfuse.inference.engines import Engine, Reader
from tokenfuse.inference.json_lines import JsonLines
from tokenfuse.inference.measure import Say
from tokenfuse.inference.rows import Row


class Answer(BaseModel):
    """What became of one row.

    ``run``: a hash of the strategy, the model and all else that decides the answer. ``question``:
    as the model was asked it. ``answer`` or ``error`` is given. ``frames`` were sampled;
    ``prompt_before`` and ``prompt_after`` are tokens of the prompt without and with compression.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    run: str
    video: str
    question: str
    answer: str | None = None
    error: str | None = None
    frames: int | None = None
    prompt_before: int | None = None
    prompt_after: int | None = None


class Answers:
    """A file of answers, written line by line.

    Raises ConfigError where the file is of something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = JsonLines(path)
        self.held: dict[tuple[str, str], Answer] = {}
        for number, line in enumerate(self._file.lines, 1):
            try:
                answer = Answer.model_validate_json(line)
            except ValidationError as error:
                raise ConfigError(
                    f"{path}, line {number}: this is no answer of tokenfuse batch; expected "
                    "another file to write to"
                ) from error
            self.held[answer.id, answer.run] = answer

    def has(self, row: Row, run: str) -> bool:
        """Whether a row is answered. Raises ConfigError where its id has asked something else."""
        found = self.held.get((row.id, run))
        if found is None:
            return False
        if (found.video, found.question) != (row.video, row.text):
            raise ConfigError(
                f"{self.path} has an answer to {found.question!r} about {found.video} under the id "
                f"{row.id!r}; expected another id for another question, or another file"
            )
        return True

    def add(self, answer: Answer) -> None:
        """Append one line. Raises OSError where there is no room."""
        self._file.add(_line(answer))
        self.held[answer.id, answer.run] = answer

    def forget_failed(self, run: str) -> None:
        """Leave out the rows of a run that failed, so that they are answered anew."""
        left = {at: x for at, x in self.held.items() if x.error is None or x.run != run}
        if len(left) < len(self.held):
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text("".join(f"{_line(x)}\n" for x in left.values()), "utf-8")
            part.replace(self.path)
            self.held, self._file = left, JsonLines(self.path)


def _line(answer: Answer) -> str:
    return answer.model_dump_json(exclude_none=True)


def run_key(configuration: Configuration | None, source: str | Path, **options: Any) -> str:
    """The hash by which rows of one run know each other; of the answers' ``run``."""
    described = None if configuration is None else configuration.describe()
    whole = {"configuration": described, "model": str(source), **options}
    return sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


def answer_all(
    rows: Sequence[Row],
    answers: Answers,
    start: Callable[[], Engine],
    reader: Reader,
    *,
    key: str,
    say: Say = lambda _: None,
) -> int:
    """Answer all rows that ``answers`` lacks; how many of the rows have failed.

    ``start``: makes the engine, called where there is something to answer. ``key``: the run's hash.
    A row whose video or question cannot be used gets an ``error``, and so does one that the model
    cannot answer; rows beside it are answered all the same.

    Raises ConfigError where an answer stands there to something else, what ``start`` raises, and
    OSError where an answer cannot be written; the run can then be resumed.
    """
    left = [row for row in rows if not answers.has(row, key)]
    if left:
        say("loading the model")
        engine = start()
        told = _Told(len(rows), len(rows) - len(left), say)
        for row, reply in engine.answers(left, reader):
            asked: dict[str, Any] = {
                "id": row.id,
                "run": key,
                "video": row.video,
                "question": row.text,
            }
            answers.add(Answer(**asked, **reply._asdict()))
            told.one(failed=reply.error is not None)
    return sum(answers.held[row.id, key].error is not None for row in rows)


class _Told:
    """Progress: how many rows are answered, at which rate, and for how long still."""

    def __init__(self, count: int, done: int, say: Say) -> None:
        self.count, self.begun, self.done, self.failed = count, done, done, 0
        self.start, self.say = time.monotonic(), say

    def one(self, *, failed: bool) -> None:
        self.done += 1
        self.failed += failed
        rate = (self.done - self.begun) / max(1e-9, time.monotonic() - self.start)
        left = (self.count - self.done) / rate
        words = f"{self.done} of {self.count} rows, {rate:.2f} a second, about {left:.0f} s left"
        self.say(words + (f"; {self.failed} failed" if self.failed else ""))
