"""Many questions about many videos: JSON Lines in, JSON Lines out, resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenfuse.config import Configuration
from tokenfuse.errors import ConfigError, TokenFuseError, did_you_mean
from tokenfuse.inference.generate import decode, generate
from tokenfuse.inference.inputs import (
    batch_inputs,
    frames_as_images,
    refuse_images_only,
    refuse_special_tokens,
)
from tokenfuse.inference.json_lines import JsonLines
from tokenfuse.inference.load import load
from tokenfuse.inference.measure import Say
from tokenfuse.inference.video import Video, check_sampling, read_video
from tokenfuse.sessions.attach import attach

AHEAD = 4
"""Batches of which the videos are decoded at once, to put prompts of a like length together."""
MOST_PIXELS = 2**26
"""Pixels of all frames of one video; larger ones are scaled down."""
_Asked = tuple["Row", Video]
_ROW_FAILS = (TokenFuseError, MemoryError, torch.OutOfMemoryError)
"""What one row may be to blame for. What fits no row is refused before the first."""


class Row(BaseModel):
    """One question about one video.

    ``video``: a path, from the folder of the input file on where it is relative. ``options``: the
    answers of a multiple-choice question, which are put below it with a letter each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    video: str
    question: str = Field(min_length=1)
    options: tuple[str, ...] = Field((), max_length=len(ascii_uppercase))

    @field_validator("id", "video", "question", "options")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{text!r} is no text: {error.reason}") from None
        return value

    @field_validator("id", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def text(self) -> str:
        """The question as the model is asked it."""
        if not self.options:
            return self.question
        letters = zip(ascii_uppercase, self.options, strict=False)
        choices = "".join(f"\n{letter}. {words}" for letter, words in letters)
        return f"{self.question}{choices}\nAnswer with the option's letter from the given choices."


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


def read_rows(path: Path) -> list[Row]:
    """The questions of a file of JSON Lines.

    Raises ConfigError that names the line and what is wrong in it.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file; expected JSON Lines with id, video and question")
    rows: list[Row] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        row = _row(line, f"{path}, line {number}: ")
        if row.id in lines:
            raise ConfigError(
                f"{path}, line {number}: id {row.id!r} is that of line {lines[row.id]}, too; "
                "expected one of its own for each row"
            )
        lines[row.id] = number
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path} holds no questions; expected one JSON object on each line")
    return rows


def _row(line: bytes, where: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}{error}; expected one JSON object") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}expected one JSON object, not {type(values).__name__}")
    try:
        return Row.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(name, Row.model_fields)
            raise ConfigError(f"{where}unknown key {name}: {hint}") from None
        message = first["msg"].replace("Input should", "it should").removeprefix("Value error, ")
        raise ConfigError(f"{where}{name} is wrong: {message}") from None


def part_of(rows: Sequence[Row], shard: str | None, limit: int | None) -> list[Row]:
    """Every ``n``-th row from the ``i``-th on for the shard ``"i/n"``, ``limit`` of them at most.

    Raises ConfigError for another form.
    """
    chosen = list(rows)
    if shard is not None:
        i, _, n = shard.partition("/")
        if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
            raise ConfigError(f"shard {shard!r} is wrong; expected i/n, such as 1/4 to 4/4")
        chosen = chosen[int(i) - 1 :: int(n)]
    return chosen[:limit]


def run_key(configuration: Configuration | None, source: str | Path, **options: Any) -> str:
    """The hash by which rows of one run know each other; of the answers' ``run``."""
    described = None if configuration is None else configuration.describe()
    whole = {"configuration": described, "model": str(source), **options}
    return sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


def answer_all(
    rows: Sequence[Row],
    answers: Answers,
    configuration: Configuration | None,
    *,
    source: str | Path,
    folder: Path,
    frames: int | None = None,
    fps: float | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    say: Say = lambda _: None,
) -> int:
    """Answer all rows that ``answers`` lacks; how many of the rows have failed.

    ``configuration``: None for no compression. ``folder``: of relative paths of videos. A row
    whose video or question cannot be used gets an ``error``, and so does one that the model cannot
    answer; rows beside it are answered all the same.

    Raises ConfigError where an answer stands there to something else, VideoError for frames that
    nothing can be sampled by, UnsupportedModelError where the model cannot be loaded, takes no
    video or does not go with the strategy, and OSError where an answer cannot be written; the run
    can then be resumed.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is wrong; expected 1 or more")
    check_sampling(frames=frames, fps=fps)
    key = run_key(configuration, source, frames=frames, fps=fps, max_new_tokens=max_new_tokens)
    left = [row for row in rows if not answers.has(row, key)]
    if left:
        say("loading the model")
        model, processor = load(source)
        refuse_images_only(processor)
        if configuration is not None:
            attach(model, configuration).detach()
        run = _Run(model, processor, configuration, max_new_tokens, key, answers)
        run.told = _Told(len(rows), len(rows) - len(left), say)
        step = batch_size * (1 if batch_size == 1 else AHEAD)
        for start in range(0, len(left), step):
            ready: list[_Asked] = []
            for row in left[start : start + step]:
                try:
                    refuse_special_tokens(processor, row.text)
                    path = row.video if "://" in row.video else folder / row.video
                    video = read_video(path, frames=frames, fps=fps, max_pixels=MOST_PIXELS)
                except _ROW_FAILS as error:
                    run.fail(row, error)
                else:
                    ready.append((row, video))
            ready.sort(key=lambda pair: (pair[1].frames.size, len(pair[0].text)))
            for first in range(0, len(ready), batch_size):
                run.answer(ready[first : first + batch_size])
    return sum(answers.held[row.id, key].error is not None for row in rows)


@dataclass(eq=False)
class _Run:
    """What all batches of a run have in common."""

    model: Any
    processor: Any
    configuration: Configuration | None
    max_new_tokens: int
    key: str
    answers: Answers
    told: _Told = field(init=False)

    def fail(self, row: Row, error: BaseException) -> None:
        said = str(error).strip() or type(error).__name__
        self._add(row, error=said)

    def answer(self, part: Sequence[_Asked]) -> None:
        """One batch; row by row where it fails, so that one row takes no other with it."""
        try:
            texts, before, after = self._generate(part)
        except _ROW_FAILS as error:
            if len(part) == 1:
                self.fail(part[0][0], error)
                return
            for one in part:
                self.answer([one])
            return
        for (row, video), text, was, left in zip(part, texts, before, after, strict=True):
            counts: dict[str, Any] = {"prompt_before": was, "prompt_after": left}
            self._add(row, answer=text, frames=len(video.frames), **counts)

    def _generate(self, part: Sequence[_Asked]) -> tuple[list[str], list[int], list[int]]:
        """The answers, and the lengths of the prompts without and with compression."""
        videos, texts = [video for _, video in part], [row.text for row, _ in part]
        inputs = batch_inputs(self.processor, videos, texts).to(self.model.device)
        before = after = inputs["attention_mask"].sum(-1).tolist()
        if self.configuration is None:
            found = generate(self.model, inputs, max_new_tokens=self.max_new_tokens)
        else:
            alone = frames_as_images(inputs)
            with attach(self.model, self.configuration, frames_as_images=alone) as session:
                found = generate(self.model, inputs, max_new_tokens=self.max_new_tokens)
            after = session.report.prompt_after
        return decode(self.processor, found.ids), before, after

    def _add(self, row: Row, **values: Any) -> None:
        self.answers.add(
            Answer(id=row.id, run=self.key, video=row.video, question=row.text, **values)
        )
        self.told.one(failed="error" in values)


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
