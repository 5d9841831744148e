"""One question about one video, answered with every strategy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tokenfuse.bench.candidates import UNCOMPRESSED, Candidate, candidates
from tokenfuse.bench.memory import peak_memory
from tokenfuse.compression import prompt_adapter
from tokenfuse.costs import versions
from tokenfuse.errors import TokenFuseError
from tokenfuse.inference.inputs import frames_as_images, video_inputs
from tokenfuse.inference.run import Say, check_repeats, first_token_ms, load
from tokenfuse.inference.video import read_video
from tokenfuse.micro import CHECKPOINT
from tokenfuse.prompt.inputs import MODALITIES
from tokenfuse.registry import default_registry
from tokenfuse.report import Report
from tokenfuse.sessions.attach import attach
from tokenfuse.sessions.proportional import proportional_attention
from tokenfuse.sessions.vlm import Session


class Row(BaseModel):
    """One strategy at one ratio, or the uncompressed run, which has neither.

    ``keep_ratio`` is what was asked for, ``kept`` the share that survived. ``kl`` is the divergence
    of the first token's distribution from the uncompressed one in nats, ``speedup`` the
    uncompressed time to first token over this one, ``peak_bytes`` the most memory that tensors of
    the run took, without weights and inputs. Where a strategy could not run there is only the
    ``reason``.
    """

    model_config = ConfigDict(frozen=True)

    strategy: str
    keep_ratio: float | None = None
    options: dict[str, Any] | None = None
    tokens: int | None = None
    kept: float | None = None
    answer: str | None = None
    same_answer: bool | None = None
    kl: float | None = None
    plan_ms: float | None = None
    ttft_ms: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    reason: str | None = None


class Comparison(BaseModel):
    """All rows, the uncompressed one first."""

    model_config = ConfigDict(frozen=True)

    video: str
    frames: int
    duration: float
    question: str
    model: str
    device: str
    dtype: str
    repeats: int
    versions: dict[str, str]
    rows: list[Row]


def compare(
    path: str | Path,
    question: str,
    names: Sequence[str] = (),
    ratios: Sequence[float] = (0.33,),
    *,
    source: str | Path = CHECKPOINT,
    frames: int | None = None,
    fps: float | None = None,
    max_new_tokens: int = 64,
    repeats: int = 3,
    say: Say = lambda _: None,
) -> Comparison:
    """Ask a model one question about a video, uncompressed and with every strategy and ratio.

    ``names`` as in ``candidates``; all strategies if empty. ``repeats`` timings make a median.
    ``say`` hears of each step.
    """
    check_repeats(repeats)
    registry = default_registry()
    # What is wrong is said before the model, which may be large, is loaded.
    candidates(names, ratios, None, registry)
    say("decoding the video")
    video = read_video(path, frames=frames, fps=fps)
    say("loading the model")
    model, processor = load(source)
    adapter = prompt_adapter(model, registry)
    chosen = candidates(names, ratios, adapter, registry)
    inputs = video_inputs(processor, video, question).to(model.device)
    runs = _answer(model, processor, inputs, chosen, max_new_tokens, say)
    _time(model, inputs, [run for run in runs if run.logits is not None], repeats, say)
    tokens = sum(int(adapter.placeholders(inputs, kind).sum()) for kind in MODALITIES)
    plain, *others = runs
    first = Row(
        strategy=UNCOMPRESSED.label,
        tokens=tokens,
        kept=1.0,
        answer=plain.text,
        ttft_ms=statistics.median(plain.times),
        speedup=1.0,
        peak_bytes=plain.peak,
    )
    return Comparison(
        video=str(path),
        frames=len(video.frames),
        duration=video.duration,
        question=question,
        model=str(source),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        repeats=repeats,
        versions=versions(),
        rows=[first, *(_row(run, plain) for run in others)],
    )


def generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """The greedy answers' ids ``(B, A)``, and the first token's fp32 logits ``(B, V)``."""
    with proportional_attention(model, getattr(inputs, "shares", None)):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.logits[0].float()


def why(error: Exception) -> str:
    """What to show in place of figures: one strategy that fails leaves the others theirs."""
    text = str(error).strip()
    return text if isinstance(error, TokenFuseError) else f"{type(error).__name__}: {text}"


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats of each row, from logits ``(B, V)``."""
    p, q = (logits.float().log_softmax(-1) for logits in (reference, other))
    # Rounding can leave less than nothing.
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


@dataclass(eq=False)
class _Run:
    """What one candidate did; without logits where it could not run, for ``reason``."""

    candidate: Candidate
    reason: str | None
    text: str = ""
    logits: Tensor | None = None
    peak: int = 0
    times: list[float] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def attached(self, model: Any, inputs: Any) -> AbstractContextManager[Session | None]:
        strategy = self.candidate.strategy
        if strategy is None:
            return nullcontext()
        return attach(model, strategy, frames_as_images=frames_as_images(inputs))


def _answer(
    model: Any,
    processor: Any,
    inputs: Any,
    chosen: Sequence[Candidate],
    max_new_tokens: int,
    say: Say,
) -> list[_Run]:
    """A run of each candidate, the uncompressed one first."""
    plain = UNCOMPRESSED
    runs = [_Run(candidate, candidate.reason) for candidate in (plain, *chosen)]
    for run in runs:
        if run.reason:
            continue
        say(f"answering {run.candidate.title}")
        try:
            with run.attached(model, inputs), peak_memory(model.device) as peak:
                ids, logits = generate(model, inputs, max_new_tokens)
        except Exception as error:
            if run.candidate is plain:
                raise
            run.reason = why(error)
            continue
        run.peak = peak()
        run.logits = logits.cpu()
        run.text = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    return runs


def _time(model: Any, inputs: Any, runs: Sequence[_Run], repeats: int, say: Say) -> None:
    """Add times and reports to each run. All have warmed up by answering.

    They take turns, so that the machine's drift is in all alike.
    """
    for turn in range(repeats):
        say(f"timing the first token, {turn + 1} of {repeats}")
        for run in runs:
            with run.attached(model, inputs) as session:
                run.times.append(first_token_ms(model, inputs))
            if session and session.report:
                run.reports.append(session.report)


def _row(run: _Run, plain: _Run) -> Row:
    candidate = run.candidate
    if run.logits is None or plain.logits is None or candidate.strategy is None:
        return Row(strategy=candidate.label, keep_ratio=candidate.keep_ratio, reason=run.reason)
    report = run.reports[0]
    ms = statistics.median(run.times)
    return Row(
        strategy=candidate.label,
        keep_ratio=candidate.keep_ratio,
        options=candidate.strategy.describe(),
        tokens=report.tokens_after,
        kept=report.keep_ratio,
        answer=run.text,
        same_answer=run.text == plain.text,
        kl=float(divergence(plain.logits, run.logits)[0]),
        plan_ms=statistics.median(report.plan_ms for report in run.reports),
        ttft_ms=ms,
        speedup=statistics.median(plain.times) / ms,
        peak_bytes=run.peak,
        # A prompt that came through as it was says why.
        reason=report.reason if candidate.keep_ratio < 1 else None,
    )
