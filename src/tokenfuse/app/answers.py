"""One question about one clip, answered without compression and with each of some strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenfuse.config import Configuration
from tokenfuse.costs import flops, size
from tokenfuse.inference.inputs import video_inputs
from tokenfuse.inference.measure import Say, measure_answer, measure_times
from tokenfuse.inference.run import Ready, traced
from tokenfuse.inference.video import Video
from tokenfuse.pictures import TokenMap
from tokenfuse.report import Report

HEAD = ("", "answer", "visual tokens", "prompt", "prefill", "KV cache", "first token")
REPEATS = 3
"""Timings per median."""


@dataclass(frozen=True)
class Answered:
    """What one configuration answered, and what it cost; ``report`` is None without compression.

    ``ttft_ms``: milliseconds to the first token, vision and compression included. ``maps``: what
    became of each token of the clip, one map for each image or video of the prompt.
    """

    title: str
    text: str
    ttft_ms: float
    report: Report | None
    maps: list[TokenMap]


def answer(
    model: Any,
    processor: Any,
    video: Video,
    question: str,
    configurations: Sequence[Configuration],
    *,
    max_new_tokens: int = 64,
    say: Say = lambda _: None,
) -> list[Answered]:
    """The answer without compression, then that of each configuration.

    Raises as ``tokenfuse.inference.run.run`` does.
    """
    inputs = video_inputs(processor, video, question).to(model.device)
    measured = []
    for chosen in (None, *configurations):
        say(
            "answering without compression" if chosen is None else f"answering with {_name(chosen)}"
        )
        measured.append(
            measure_answer(model, processor, inputs, chosen, max_new_tokens=max_new_tokens)
        )
    measure_times(model, inputs, measured, REPEATS, say)
    ready = Ready(model, processor, video, inputs, {})
    found = []
    for one in measured:
        chosen = one.configuration
        if chosen is None:
            found.append(Answered("no compression", one.text, one.ttft_ms, None, []))
            continue
        say(f"following the tokens of {_name(chosen)}")
        maps = traced(ready, chosen)
        found.append(Answered(_name(chosen), one.text, one.ttft_ms, one.report, maps))
    return found


def rows(answered: Sequence[Answered]) -> list[list[str]]:
    """A table of the answers and what each cost, below HEAD."""
    report = next((one.report for one in answered if one.report), None)
    return [_row(one, report) for one in answered]


def _row(one: Answered, any_report: Report | None) -> list[str]:
    costs = ["", "", "", ""]
    if one.report is not None:
        report = one.report
        before = report.tokens_before
        words = f"{round(report.layer_average * before)} of {before} ({report.layer_average:.0%})"
        if report.layer_tokens is not None:
            words += ", on average of all layers"
        if why := report.reason or next((x.reason for x in report.items if x.reason), None):
            words += f": {why}"
        costs = [
            words,
            str(sum(report.prompt_after)),
            flops(report.prefill_flops_after),
            size(report.kv_cache_bytes_after),
        ]
    elif any_report is not None:
        costs = [
            str(any_report.tokens_before),
            str(sum(any_report.prompt_before)),
            flops(any_report.prefill_flops_before),
            size(any_report.kv_cache_bytes_before),
        ]
    return [one.title, one.text, *costs, f"{one.ttft_ms:.0f} ms"]


def _name(configuration: Configuration) -> str:
    return str(configuration.strategy)
