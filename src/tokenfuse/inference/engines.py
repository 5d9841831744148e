"""What answers the rows of a batch: transformers here, other engines in ``integrations``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from tokenfuse.config import Configuration
from tokenfuse.errors import ConfigError, TokenFuseError
from tokenfuse.inference.generate import decode, generate
from tokenfuse.inference.inputs import (
    batch_inputs,
    frames_as_images,
    refuse_images_only,
    refuse_special_tokens,
)
from tokenfuse.inference.load import load
from tokenfuse.inference.rows import Row
from tokenfuse.inference.video import Video, check_sampling, read_video
from tokenfuse.sessions.attach import attach

AHEAD = 4
"""Batches of which the videos are decoded at once, to put prompts of a like length together."""
MOST_PIXELS = 2**26
"""Pixels of all frames of one video; larger ones are scaled down."""
Asked = tuple[Row, Video]


class Reply(NamedTuple):
    """What became of one row: an answer or an error, and what an ``Answer`` says beside it."""

    answer: str | None = None
    error: str | None = None
    frames: int | None = None
    prompt_before: int | None = None
    prompt_after: int | None = None


def failed(error: BaseException) -> Reply:
    """The reply that names a row's error."""
    return Reply(error=str(error).strip() or type(error).__name__)


@dataclass(frozen=True)
class Reader:
    """Reads the videos of rows. ``folder``: of relative paths.

    Raises VideoError for frames that nothing can be sampled by.
    """

    folder: Path
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        check_sampling(frames=self.frames, fps=self.fps)

    def read(self, row: Row) -> Video:
        """The video of one row. Raises VideoError where it cannot be read."""
        path = row.video if "://" in row.video else self.folder / row.video
        return read_video(path, frames=self.frames, fps=self.fps, max_pixels=MOST_PIXELS)


class Engine(Protocol):
    """Answers rows: every one once, in any order."""

    def answers(self, rows: Sequence[Row], reader: Reader) -> Iterator[tuple[Row, Reply]]:
        """Yield each row with what became of it, as soon as that is known."""
        ...


class Batched(ABC):
    """An engine that answers some rows at once, and each alone where they fail together."""

    row_fails: tuple[type[BaseException], ...] = (TokenFuseError, MemoryError)
    """What one row may be to blame for. What fits no row is refused before the first."""

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size} is wrong; expected 1 or more")
        self.batch_size = batch_size

    @abstractmethod
    def check(self, row: Row) -> None:
        """Raise an error for a question that cannot be asked."""

    @abstractmethod
    def reply(self, part: Sequence[Asked]) -> list[Reply]:
        """The replies to rows that are asked at once."""

    def answers(self, rows: Sequence[Row], reader: Reader) -> Iterator[tuple[Row, Reply]]:
        """Yield each row with what became of it, videos of a like size together."""
        step = self.batch_size * (1 if self.batch_size == 1 else AHEAD)
        for start in range(0, len(rows), step):
            ready: list[Asked] = []
            for row in rows[start : start + step]:
                try:
                    self.check(row)
                    ready.append((row, reader.read(row)))
                except self.row_fails as error:
                    yield row, failed(error)
            ready.sort(key=lambda pair: (pair[1].frames.size, len(pair[0].text)))
            for first in range(0, len(ready), self.batch_size):
                yield from self._part(ready[first : first + self.batch_size])

    def _part(self, part: Sequence[Asked]) -> Iterator[tuple[Row, Reply]]:
        try:
            replies = self.reply(part)
        except self.row_fails as error:
            if len(part) == 1:
                yield part[0][0], failed(error)
                return
            for one in part:
                yield from self._part([one])
            return
        yield from ((row, reply) for (row, _), reply in zip(part, replies, strict=True))


class Transformers(Batched):
    """Answers by transformers in this process. ``configuration``: None for no compression.

    Raises UnsupportedModelError where the model cannot be loaded, takes no video or does not go
    with the strategy.
    """

    row_fails = (*Batched.row_fails, torch.OutOfMemoryError)

    def __init__(
        self,
        source: str | Path,
        configuration: Configuration | None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 1,
    ) -> None:
        super().__init__(batch_size)
        self.configuration, self.max_new_tokens = configuration, max_new_tokens
        self.model, self.processor = load(source)
        refuse_images_only(self.processor)
        if configuration is not None:
            attach(self.model, configuration).detach()

    def check(self, row: Row) -> None:
        refuse_special_tokens(self.processor, row.text)

    def reply(self, part: Sequence[Asked]) -> list[Reply]:
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
        lines = zip(decode(self.processor, found.ids), videos, before, after, strict=True)
        return [Reply(text, None, len(v.frames), was, left) for text, v, was, left in lines]
