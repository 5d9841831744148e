"""The time to the first token and per token, with and without compression."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tokenfuse.bench.candidates import UNCOMPRESSED, Candidate, Row, candidates
from tokenfuse.bench.encoded import EncodedPrompt
from tokenfuse.bench.memory import peak_memory
from tokenfuse.bench.speed.sizes import (
    build,
    check_memory,
    config_of,
    needed_bytes,
    size_of,
    video_prompt,
)
from tokenfuse.compression import (
    CompressedInputs,
    prompt_adapter,
    told_by_layer,
)
from tokenfuse.config import Configuration, get_configuration
from tokenfuse.costs import Stopwatch, versions
from tokenfuse.errors import ConfigError
from tokenfuse.inference.generate import generate
from tokenfuse.inference.measure import Say
from tokenfuse.registry import default_registry
from tokenfuse.report import Report

DTYPES = ("float32", "bfloat16", "float16")
EVERYTHING = {"strategy": "uniform", "keep_ratio": 1.0}


class SpeedRow(Row):
    """What one configuration takes, medians in milliseconds.

    ``tokens``: visual tokens that a decoder layer reads of a prompt, on average. ``vision_ms``: the
    tower; ``compress_ms``: choosing, fusing and shortening; ``prefill_ms``: the LLM over what is
    left, up to the first token; ``ttft_ms``: all three, with the least and the most that was
    measured in ``ttft_range``; ``decode_ms``: each token after it. ``peak_bytes``: the most memory
    that tensors of compression, prefill and decoding take, without weights and inputs;
    ``kv_bytes``: the cache.

    ``llm_speedup``: prefill without compression ÷ compression and prefill with it. ``ideal``: the
    same of their FLOPs. ``ttft_speedup``: of all, the tower included.
    """

    tokens: float | None = None
    vision_ms: float | None = None
    compress_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    ttft_range: tuple[float, float] | None = None
    decode_ms: float | None = None
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    llm_speedup: float | None = None
    ideal: float | None = None
    ttft_speedup: float | None = None

    @property
    def of_ideal(self) -> float | None:
        """The share of the ideal speed-up of the LLM that is reached."""
        if self.llm_speedup is None or self.ideal is None:
            return None
        return self.llm_speedup / self.ideal


class Speed(BaseModel):
    """All rows, the uncompressed one first, and what they were measured on."""

    model_config = ConfigDict(frozen=True)

    model: str
    random_weights: bool
    layers: int
    hidden: int
    vision_blocks: int
    vision_hidden: int
    grid: tuple[int, int, int]
    prompt_tokens: int
    batch: int
    dtype: str
    device: str
    threads: int
    machine: str
    repeats: int
    decode_steps: int
    versions: dict[str, str]
    rows: list[SpeedRow]


class _Clock:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch, self._begun = watch, False

    def put(self, value: Tensor) -> None:
        """End a step with every token."""
        if self._begun:
            self._watch.lap()
        self._begun = True

    def end(self) -> None:
        """Nothing is left to do."""


def speed(
    names: Sequence[str],
    ratios: Sequence[float],
    *,
    like: str = "Qwen/Qwen3-VL-2B-Instruct",
    source: str | None = None,
    layers: int | None = 4,
    vision_layers: int | None = None,
    frames: int = 16,
    side: tuple[int, int] = (16, 16),
    batch: int = 1,
    dtype: str = "float32",
    device: str | None = None,
    repeats: int = 3,
    decode_steps: int = 4,
    say: Say = lambda _: None,
) -> Speed:
    """Time one prompt, uncompressed and with every strategy and budget.

    ``like``: whose depth and width the model has, with random weights and no more than ``layers``
    decoder layers and ``vision_layers`` blocks; ``source``: a folder or hub id of real weights
    instead. ``frames`` are those that the tower reads, pairs of a video's; ``side``: rows and
    columns of visual tokens. Runs take turns; the first of each warms up. ``say`` hears of each
    step.

    Raises ConfigError where an option is wrong or the run would not fit in memory.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    counts = {"frames": frames, "batch": batch, "repeats": repeats, "decode-steps": decode_steps}
    for name, value in (*counts.items(), ("grid", min(side))):
        if value < 1:
            raise ConfigError(f"--{name} is {value}; expected 1 or more")
    registry = default_registry()
    candidates(names, ratios, None, registry)
    chosen = getattr(torch, dtype)
    where = device_of(device)
    grid = (frames, *side)
    tokens = frames * side[0] * side[1]
    if source is None:
        config = config_of(size_of(like), layers, vision_layers)
        check_memory(needed_bytes(config, tokens, batch, chosen), where)
        say("making the model")
        model = build(config, chosen, where)
    else:
        from tokenfuse.inference.load import load

        say("loading the model")
        model = load(source)[0].to(where, chosen)
        check_memory(needed_bytes(model.config, tokens, batch, chosen, loaded=True), where)
    inputs = video_prompt(model, grid, batch, chosen)
    adapter = prompt_adapter(model, registry)
    found = candidates(names, ratios, adapter, registry)
    bench = _Bench(model, adapter, inputs, decode_steps)
    rows = bench.rows(found, repeats, say)
    text, vision = model.config.text_config, model.config.vision_config
    return Speed(
        model=source or like,
        random_weights=source is None,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vision_blocks=vision.depth,
        vision_hidden=vision.hidden_size,
        grid=grid,
        prompt_tokens=inputs["input_ids"].shape[1],
        batch=batch,
        dtype=dtype,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        machine=platform.platform(),
        repeats=repeats,
        decode_steps=decode_steps,
        versions=versions(),
        rows=rows,
    )


def device_of(name: str | None) -> torch.device:
    """The device of a name; a GPU if there is one and none is named. Raises ConfigError."""
    there = torch.cuda.is_available()
    try:
        found = torch.device(name or ("cuda" if there else "cpu"))
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cuda" and not there):
        raise ConfigError(
            f"--device {name} is not here; expected cpu" + (" or cuda" if there else "")
        )
    return found


class _Bench:
    """One prompt on one model."""

    def __init__(
        self, model: Any, adapter: Any, inputs: Mapping[str, Tensor], decode_steps: int
    ) -> None:
        self.model, self.adapter, self.inputs = model, adapter, inputs
        self.steps = decode_steps
        self.prompt = EncodedPrompt(adapter, inputs)
        # What shows something new must not be made up by a model that has learned nothing.
        config = model.config
        self.never = [config.image_token_id, config.video_token_id]
        self.everything = get_configuration(EVERYTHING)
        self.whole = self.prompt.shorten(self.everything)

    @torch.no_grad()
    def rows(self, chosen: Sequence[Candidate], repeats: int, say: Say) -> list[SpeedRow]:
        """Every row, the uncompressed one first."""
        runs = [_Run(UNCOMPRESSED, self.everything)]
        failed: dict[int, SpeedRow] = {}
        for place, candidate in enumerate(chosen):
            if candidate.configuration is None:
                failed[place] = SpeedRow.of(candidate)
            else:
                runs.append(_Run(candidate, candidate.configuration))
        towers = {self.prompt.key(run.configuration): run.configuration for run in runs}
        vision: dict[Any, list[float]] = {key: [] for key in towers}
        began, done = time.perf_counter(), 0
        total = (repeats + 1) * (len(runs) + len(towers))
        for turn in range(repeats + 1):
            for key, configuration in towers.items():
                say(self._progress("the vision tower", turn, repeats, done, total, began))
                vision[key].append(self._vision(configuration))
                done += 1
            for run in runs:
                say(self._progress(run.candidate.title, turn, repeats, done, total, began))
                run.times.append(self._time(run))
                done += 1
        for run in runs:
            say(f"memory, {run.candidate.title}")
            run.peak = self._peak(run)
        made = [self._row(run, runs[0], vision) for run in runs]
        for place, row in failed.items():
            made.insert(place + 1, row)
        return made

    def _progress(
        self, what: str, turn: int, repeats: int, done: int, total: int, began: float
    ) -> str:
        turns = "warming up" if turn == 0 else f"turn {turn} of {repeats}"
        if not done:
            return f"{what}, {turns}"
        left = (time.perf_counter() - began) / done * (total - done)
        return f"{what}, {turns}, about {left:.0f} s left"

    def _vision(self, configuration: Configuration) -> float:
        """Milliseconds of the tower, and of what acts before and inside it."""
        watch = Stopwatch(self.model.device)
        self.prompt.encode(configuration)
        watch.lap()
        return watch.read()[0]

    def _shorten(self, run: _Run) -> CompressedInputs:
        if run.candidate.configuration is None:
            return self.whole
        return self.prompt.shorten(run.configuration)

    def _generate(self, run: _Run, short: CompressedInputs, **options: Any) -> Report:
        """Answer; the report of what was read."""
        found = generate(
            self.model,
            short,
            strategy=run.configuration.strategy,
            suppress_tokens=self.never,
            **options,
        )
        if found.layers is None:
            return short.report
        return told_by_layer(self.adapter, short.report, *found.layers, short)

    def _time(self, run: _Run) -> tuple[float, float, float]:
        """Milliseconds of compression, of prefill, and of each token after the first."""
        # Encoded before, if that is for the first time.
        self.prompt.encoded(run.configuration)
        watch = Stopwatch(self.model.device)
        short = self._shorten(run)
        watch.lap()
        more = self.steps
        run.report = self._generate(
            run,
            short,
            streamer=_Clock(watch),
            max_new_tokens=1 + more,
            min_new_tokens=1 + more,
        )
        compress, prefill, *tokens = watch.read()
        return compress, prefill, statistics.median(tokens) if tokens else 0.0

    def _peak(self, run: _Run) -> int:
        with peak_memory(self.model.device) as peak:
            self._generate(run, self._shorten(run), max_new_tokens=2, min_new_tokens=2)
        return peak()

    def _row(self, run: _Run, plain: _Run, vision: Mapping[Any, list[float]]) -> SpeedRow:
        key = self.prompt.key(run.configuration)
        # The first of each warms up.
        tower, own, other = vision[key][1:], run.times[1:], plain.times[1:]
        compress, prefill, decode = (statistics.median(x) for x in zip(*own, strict=True))
        compress = 0.0 if run is plain else compress
        llm = [c + p for c, p, _ in own] if run is not plain else [p for _, p, _ in own]
        first = [v + x for v, x in zip(tower, llm, strict=True)]
        whole = [
            v + p
            for v, (_, p, _) in zip(
                vision[self.prompt.key(self.everything)][1:], other, strict=True
            )
        ]
        report, rows = run.report, len(run.report.prompt_after)
        before = report.prefill_flops_before
        return SpeedRow.of(run.candidate).model_copy(
            update={
                "tokens": report.layer_average * report.tokens_before / rows,
                "vision_ms": statistics.median(tower),
                "compress_ms": compress,
                "prefill_ms": prefill,
                "ttft_ms": statistics.median(first),
                "ttft_range": (min(first), max(first)),
                "decode_ms": decode,
                "peak_bytes": run.peak,
                "kv_bytes": report.kv_cache_bytes_after,
                "llm_speedup": _ratio([p for _, p, _ in other], llm),
                "ideal": before / report.prefill_flops_after,
                "ttft_speedup": _ratio(whole, first),
            }
        )


class _Run:
    """The timings of one candidate."""

    def __init__(self, candidate: Candidate, configuration: Configuration) -> None:
        self.candidate, self.configuration = candidate, configuration
        self.times: list[tuple[float, float, float]] = []
        self.report: Report
        self.peak = 0


def _ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """The median of ratios of runs that took turns."""
    return statistics.median(a / b for a, b in zip(before, after, strict=True))
