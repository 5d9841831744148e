"""From a video file to an answer, with and without compression."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from tokenfuse.config import Configuration
from tokenfuse.inference.inputs import frames_as_images, video_inputs
from tokenfuse.inference.load import load
from tokenfuse.inference.measure import (
    Measured,
    Say,
    check_repeats,
    measure_answer,
    measure_times,
)
from tokenfuse.inference.trace import trace
from tokenfuse.inference.video import Video, read_video
from tokenfuse.pictures import TokenMap
from tokenfuse.report import Report


class VideoQuestion(BaseModel):
    """A question about a video, and the model that was asked.

    ``frames`` of ``total_frames`` were sampled, which last ``duration`` seconds. Times are medians
    of ``repeats`` timings.
    ``note``: what one must know before believing the answers.
    """

    model_config = ConfigDict(frozen=True)

    video: str
    frames: int
    total_frames: int
    duration: float
    question: str
    model: str
    device: str
    dtype: str
    repeats: int
    note: str | None = None


class Answer(BaseModel):
    """A generated text, and the median time to its first token in milliseconds, vision included."""

    model_config = ConfigDict(frozen=True)

    text: str
    ttft_ms: float


class RunResult(VideoQuestion):
    """The answer with compression and, unless it was left out, without.

    ``timestamps``: when each frame is shown, in seconds.
    """

    timestamps: list[float]
    compressed: Answer
    uncompressed: Answer | None
    report: Report

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def same_answer(self) -> bool | None:
        return None if self.uncompressed is None else self.uncompressed.text == self.compressed.text


@dataclass(frozen=True, eq=False)
class Ready:
    """A model with a prompt for it; ``about``: the fields of VideoQuestion."""

    model: Any
    processor: Any
    video: Video
    inputs: Any
    about: dict[str, Any]


def prepare(
    path: str | Path,
    question: str,
    source: str | Path,
    *,
    frames: int | None,
    fps: float | None,
    repeats: int,
    say: Say,
) -> Ready:
    """Decode a video, load a model, and make the inputs for a question.

    Raises VideoError, UnsupportedModelError or ConfigError.
    """
    check_repeats(repeats)
    say("decoding the video")
    video = read_video(path, frames=frames, fps=fps)
    say("loading the model")
    model, processor = load(source)
    inputs = video_inputs(processor, video, question).to(model.device)
    about = {
        "video": str(path),
        "frames": len(video.frames),
        "total_frames": video.total_frames,
        "duration": video.duration,
        "question": question,
        "model": str(source),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "repeats": repeats,
    }
    return Ready(model, processor, video, inputs, about)


def run(
    path: str | Path,
    question: str,
    configuration: Configuration,
    *,
    source: str | Path,
    frames: int | None = None,
    fps: float | None = None,
    compare: bool = True,
    max_new_tokens: int = 64,
    repeats: int = 3,
    picture: Path | None = None,
    say: Say = lambda _: None,
) -> RunResult:
    """Decode a video and ask a model, with compression and, if ``compare``, without.

    ``source``: the model's folder or hub id. ``frames`` or ``fps`` sample the video as for
    ``read_video``. ``picture``: a file into which what was kept is drawn. ``say`` hears of each
    step.

    Raises VideoError, UnsupportedModelError, ConfigError or PromptError.
    """
    ready = prepare(path, question, source, frames=frames, fps=fps, repeats=repeats, say=say)
    model, inputs = ready.model, ready.inputs

    def answer(chosen: Configuration | None) -> Measured:
        say(f"answering with {chosen.strategy.name}" if chosen else "answering without compression")
        return measure_answer(model, ready.processor, inputs, chosen, max_new_tokens=max_new_tokens)

    plain = answer(None) if compare else None
    short = answer(configuration)
    measure_times(model, inputs, [plain, short] if plain else [short], repeats, say)
    if picture is not None:
        say(f"drawing {picture}")
        traced(ready, configuration)[0].save(picture)
    return RunResult(
        **ready.about,
        timestamps=ready.video.timestamps,
        compressed=Answer(text=short.text, ttft_ms=short.ttft_ms),
        uncompressed=Answer(text=plain.text, ttft_ms=plain.ttft_ms) if plain else None,
        report=short.report,
    )


def traced(ready: Ready, configuration: Configuration) -> list[TokenMap]:
    """What becomes of each token of the video."""
    video = ready.video
    alone = frames_as_images(ready.inputs)
    return trace(
        ready.model,
        ready.processor,
        ready.inputs,
        configuration,
        frames=[video.frames],
        timestamps=[video.timestamps],
        frames_as_images=alone,
    )
