"""One question about one video, answered with every strategy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tokenfuse.bench.candidates import UNCOMPRESSED, Candidate, Row, candidates
from tokenfuse.bench.memory import peak_memory
from tokenfuse.compression import prompt_adapter
from tokenfuse.costs import versions
from tokenfuse.errors import TokenFuseError
from tokenfuse.inference.measure import Measured, Say, measure_answer, measure_times
from tokenfuse.inference.run import VideoQuestion, prepare
from tokenfuse.prompt.inputs import MODALITIES
from tokenfuse.registry import default_registry


class VideoRow(Row):
    """The answer of one candidate, and what it took.

    ``tokens`` are those that a decoder layer reads, on average over layers, ``kept`` their share,
    ``kl`` the divergence of the first token's distribution from the uncompressed one in nats,
    ``plan_ms`` what choosing took, ``speedup`` the uncompressed time to first token over this one,
    ``peak_bytes`` the most memory that tensors of the run took, without weights and inputs.
    """

    tokens: int | None = None
    kept: float | None = None
    answer: str | None = None
    same_answer: bool | None = None
    kl: float | None = None
    plan_ms: float | None = None
    ttft_ms: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None


class Comparison(VideoQuestion):
    """All rows, the uncompressed one first."""

    versions: dict[str, str]
    rows: list[VideoRow]


def compare(
    path: str | Path,
    question: str,
    names: Sequence[str] = (),
    ratios: Sequence[float] = (0.33,),
    *,
    source: str | Path,
    frames: int | None = None,
    fps: float | None = None,
    max_new_tokens: int = 64,
    repeats: int = 3,
    say: Say = lambda _: None,
) -> Comparison:
    """Ask a model one question about a video, uncompressed and with every strategy and ratio.

    ``names`` as in ``candidates``; all strategies if empty. ``source``: the model's folder or hub
    id. ``repeats`` timings make a median. ``say`` hears of each step.
    """
    registry = default_registry()
    # What is wrong is said before the model, which may be large, is loaded.
    candidates(names, ratios, None, registry)
    ready = prepare(path, question, source, frames=frames, fps=fps, repeats=repeats, say=say)
    adapter = prompt_adapter(ready.model, registry)
    chosen = candidates(names, ratios, adapter, registry)
    tokens = sum(int(adapter.placeholders(ready.inputs, kind).sum()) for kind in MODALITIES)

    def answer(candidate: Candidate) -> tuple[Measured, int]:
        say(f"answering {candidate.title}")
        with peak_memory(ready.model.device) as peak:
            measured = measure_answer(
                ready.model,
                ready.processor,
                ready.inputs,
                candidate.configuration,
                max_new_tokens=max_new_tokens,
            )
        return measured, peak()

    plain, plain_peak = answer(UNCOMPRESSED)
    found: dict[Candidate, tuple[Measured, int] | str] = {}
    for candidate in chosen:
        try:
            found[candidate] = candidate.reason or answer(candidate)
        except Exception as error:
            found[candidate] = why(error)
    able = [one[0] for one in found.values() if not isinstance(one, str)]
    measure_times(ready.model, ready.inputs, [plain, *able], repeats, say)
    first = VideoRow.of(
        UNCOMPRESSED,
        tokens=tokens,
        kept=1.0,
        answer=plain.text,
        ttft_ms=plain.ttft_ms,
        speedup=1.0,
        peak_bytes=plain_peak,
    )
    rows = [
        VideoRow.of(candidate, reason=one) if isinstance(one, str) else _row(candidate, *one, plain)
        for candidate, one in found.items()
    ]
    return Comparison(**ready.about, versions=versions(), rows=[first, *rows])


def why(error: Exception) -> str:
    """What to show in place of figures: one strategy that fails leaves the others theirs."""
    text = str(error).strip()
    return text if isinstance(error, TokenFuseError) else f"{type(error).__name__}: {text}"


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats of each row, from logits ``(B, V)``."""
    p, q = (logits.float().log_softmax(-1) for logits in (reference, other))
    # Rounding can leave less than nothing.
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def _row(candidate: Candidate, measured: Measured, peak: int, plain: Measured) -> VideoRow:
    report, whole = measured.report, candidate.keep_ratio == 1
    return VideoRow.of(
        candidate,
        tokens=round(report.layer_average * report.tokens_before),
        kept=report.layer_average,
        answer=measured.text,
        same_answer=measured.text == plain.text,
        kl=float(divergence(plain.logits, measured.logits)),
        plan_ms=report.plan_ms + report.score_ms,
        ttft_ms=measured.ttft_ms,
        speedup=plain.ttft_ms / measured.ttft_ms,
        peak_bytes=peak,
        # A prompt that came through as it was says why.
        reason=None if whole else report.reason,
    )
