"""From a video file to an answer, with and without compression."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, computed_field

from tokenfuse.errors import ConfigError, UnsupportedModelError
from tokenfuse.inference.inputs import frames_as_images, video_inputs
from tokenfuse.inference.video import read_video
from tokenfuse.micro import CHECKPOINT
from tokenfuse.report import Report
from tokenfuse.sessions.attach import attach
from tokenfuse.strategies._base import Strategy

Say = Callable[[str], None]


class Answer(BaseModel):
    """A generated text, and the median time to its first token in milliseconds, vision included."""

    model_config = ConfigDict(frozen=True)

    text: str
    ttft_ms: float


class RunResult(BaseModel):
    """One question about one video, answered by one model with and without compression."""

    model_config = ConfigDict(frozen=True)

    video: str
    frames: int
    timestamps: list[float]
    duration: float
    question: str
    model: str
    device: str
    dtype: str
    repeats: int
    compressed: Answer
    uncompressed: Answer | None
    report: Report

    @computed_field  # type: ignore[prop-decorator] # mypy refuses any decorator on a property
    @property
    def same_answer(self) -> bool | None:
        return None if self.uncompressed is None else self.uncompressed.text == self.compressed.text


def load(source: str | Path = CHECKPOINT) -> tuple[Any, Any]:
    """Model and processor from a folder or a hub id: on a GPU in bf16 where there is one.

    Raises UnsupportedModelError where nothing can be loaded from ``source``.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"dtype": "auto"}
    if torch.cuda.is_available():
        options = {"dtype": torch.bfloat16, "device_map": "auto"}
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{source} cannot be loaded as an image-text-to-text model: {first}. Expected a folder "
            "with a transformers checkpoint and its processor, or a hub id such as "
            "Qwen/Qwen3-VL-8B-Instruct"
        ) from error
    return model.eval(), processor


def check_repeats(repeats: int) -> None:
    """Raise ConfigError for a number of timings that has no median."""
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; expected a number of timings, 1 or more")


def answer(model: Any, processor: Any, inputs: Mapping[str, Any], *, max_new_tokens: int) -> str:
    """Greedy answer to the first row of ``inputs``."""
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    text: str = processor.batch_decode(ids[:, prompt:], skip_special_tokens=True)[0]
    return text.strip()


def first_token_ms(model: Any, inputs: Mapping[str, Any]) -> float:
    """Milliseconds until ``generate`` has its first token, vision and compression included."""
    began = time.perf_counter()
    # Reading the token waits for a GPU to have it.
    model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    return (time.perf_counter() - began) * 1e3


def run(
    path: str | Path,
    question: str,
    strategy: Strategy,
    *,
    source: str | Path = CHECKPOINT,
    frames: int | None = None,
    fps: float | None = None,
    compare: bool = True,
    max_new_tokens: int = 64,
    repeats: int = 3,
    say: Say = lambda _: None,
) -> RunResult:
    """Decode a video and ask a model, with compression and, if ``compare``, without.

    ``say`` hears of each step.
    """
    check_repeats(repeats)
    say("decoding the video")
    video = read_video(path, frames=frames, fps=fps)
    say("loading the model")
    model, processor = load(source)
    inputs = video_inputs(processor, video, question).to(model.device)
    say("answering without compression")
    text = answer(model, processor, inputs, max_new_tokens=max_new_tokens) if compare else None
    say(f"answering with {strategy.name}")
    as_images = frames_as_images(inputs)
    with attach(model, strategy, frames_as_images=as_images):
        short_text = answer(model, processor, inputs, max_new_tokens=max_new_tokens)
    # The answers have warmed everything up; taking turns keeps the machine's drift out.
    times: list[float] = []
    timed: list[tuple[float, Report]] = []
    for turn in range(repeats):
        say(f"timing the first token, {turn + 1} of {repeats}")
        if compare:
            times.append(first_token_ms(model, inputs))
        with attach(model, strategy, frames_as_images=as_images) as session:
            short_ms = first_token_ms(model, inputs)
        if session.report is None:
            raise RuntimeError("generate was not intercepted")
        timed.append((short_ms, session.report))
    # The report is of the run whose time is given, so that its parts are parts of that time.
    short_ms, report = sorted(timed, key=lambda run: run[0])[(repeats - 1) // 2]
    compressed = Answer(text=short_text, ttft_ms=short_ms)
    uncompressed = None
    if text is not None:
        uncompressed = Answer(text=text, ttft_ms=statistics.median_low(times))
    return RunResult(
        video=str(path),
        frames=len(video.frames),
        timestamps=video.timestamps,
        duration=video.duration,
        question=question,
        model=str(source),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        repeats=repeats,
        compressed=compressed,
        uncompressed=uncompressed,
        report=report,
    )
