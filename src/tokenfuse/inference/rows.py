"""Questions about videos, as JSON Lines ask them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenfuse.errors import ConfigError, did_you_mean


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
