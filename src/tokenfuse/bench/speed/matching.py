"""How long strategies take to choose and to fuse, beside one read of the same features."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tokenfuse.bench.candidates import Candidate, Row, candidates
from tokenfuse.bench.speed.run import DTYPES, device_of
from tokenfuse.bench.speed.sizes import ALLOWANCE, check_memory
from tokenfuse.costs import Stopwatch, versions
from tokenfuse.errors import ConfigError, TokenFuseError
from tokenfuse.inference.measure import Say
from tokenfuse.ops.window import Kernel, using_kernel
from tokenfuse.registry import default_registry
from tokenfuse.strategies import Strategy
from tokenfuse.tokens import Grid, VisualTokens

WINDOWED = ("ttf",)
"""Strategies whose local window is searched by the kernels that are compared."""
TEXT = 24
"""Tokens of the question, for strategies that read it."""


@dataclass(frozen=True)
class Shape:
    """Features of a video, ``grid`` of tokens of ``width``."""

    grid: Grid
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.grid))} x {self.width} {self.dtype}"

    @property
    def bytes(self) -> int:
        """Bytes of the features."""
        element = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        frames, height, width = self.grid
        return frames * height * width * self.width * element


class MatchingRow(Row):
    """What one strategy takes on one shape, medians in milliseconds.

    ``plan_ms``: from features to the plan, with the least and the most that was measured in
    ``plan_range``; ``fuse_ms``: applying it. ``read_ms``: one sum of the features. ``reads`` and
    ``fuse_reads`` are the ratios to that.
    """

    kernel: str
    grid: tuple[int, int, int]
    width: int
    dtype: str
    read_ms: float | None = None
    plan_ms: float | None = None
    plan_range: tuple[float, float] | None = None
    fuse_ms: float | None = None
    reads: float | None = None
    fuse_reads: float | None = None


class Matching(BaseModel):
    """All rows, and what they were measured on."""

    model_config = ConfigDict(frozen=True)

    device: str
    threads: int
    machine: str
    repeats: int
    versions: dict[str, str]
    rows: list[MatchingRow]


@dataclass(frozen=True)
class _Job:
    candidate: Candidate
    strategy: Strategy
    kernel: str
    shape: Shape


def matching(
    names: Sequence[str],
    ratios: Sequence[float],
    *,
    frames: Sequence[int] = (16,),
    sides: Sequence[tuple[int, int]] = ((16, 16),),
    widths: Sequence[int] = (2048,),
    dtypes: Sequence[str] = ("float32",),
    kernels: Sequence[str] = ("auto",),
    device: str | None = None,
    repeats: int = 5,
    say: Say = lambda _: None,
) -> Matching:
    """Time the plan of every strategy at every ratio, on every shape.

    Shapes are all combinations of ``frames``, ``sides``, rows and columns, ``widths`` and
    ``dtypes``; features are noise around one frame. Strategies that search a local window run by
    every kernel. Runs of one shape take turns; the first of each warms up. A row that could not be
    measured says why. ``say`` hears of each step.

    Raises ConfigError where an option is wrong, TooLargeError where the features of a shape would
    not fit in memory.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    for kernel in kernels:
        if kernel not in get_args(Kernel):
            raise ConfigError(f"--kernel {kernel} is none of {', '.join(get_args(Kernel))}")
    sizes = {"frames": frames, "grid": [x for side in sides for x in side], "width": widths}
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise ConfigError(f"--{name} is {min(values, default='empty')}; expected 1 or more")
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}; expected 1 or more")
    found = [c for c in candidates(names, ratios, None, default_registry()) if _is_early(c)]
    if not found:
        raise ConfigError(
            f"{', '.join(names)} choose nothing before the LLM; expected strategies that do, such "
            "as ttf"
        )
    where = device_of(device)
    shapes = [
        Shape((count, *side), width, dtype)
        for count, side, width, dtype in product(frames, sides, widths, dtypes)
    ]
    for shape in shapes:
        check_memory(int(ALLOWANCE * shape.bytes), where, "fewer --frames or a smaller --grid")
    rows: list[MatchingRow] = []
    for number, shape in enumerate(shapes, 1):
        jobs = list(_jobs(found, kernels, shape))
        rows += _rows(jobs, f"shape {number} of {len(shapes)}", where, repeats, say)
    return Matching(
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        machine=platform.platform(),
        repeats=repeats,
        versions=versions(),
        rows=rows,
    )


def _is_early(candidate: Candidate) -> bool:
    """Whether a strategy chooses among bare tokens."""
    configuration = candidate.configuration
    return configuration is not None and configuration.strategy.stage == "pre_llm"


def _jobs(found: Sequence[Candidate], kernels: Sequence[str], shape: Shape) -> Iterator[_Job]:
    for candidate in found:
        assert candidate.configuration is not None
        strategy = candidate.configuration.strategy
        windowed = strategy.name in WINDOWED
        for kernel in kernels if windowed else ("auto",):
            yield _Job(candidate, strategy, kernel, shape)


@torch.no_grad()
def _rows(
    jobs: Sequence[_Job], title: str, device: torch.device, repeats: int, say: Say
) -> list[MatchingRow]:
    tokens = _tokens(jobs[0].shape, device)
    read: list[float] = []
    times: dict[int, list[tuple[float, float]]] = {number: [] for number in range(len(jobs))}
    failed: dict[int, str] = {}
    began, done, total = time.perf_counter(), 0, (repeats + 1) * len(jobs)
    for turn in range(repeats + 1):
        read.append(_read(tokens.features))
        for number, job in enumerate(jobs):
            left = (time.perf_counter() - began) / done * (total - done) if done else None
            rest = "" if left is None else f", about {left:.0f} s left"
            say(f"{title}: {job.candidate.label}, {turn}/{repeats}{rest}")
            done += 1
            if number not in failed:
                try:
                    times[number].append(_time(job, tokens))
                except (TokenFuseError, RuntimeError) as error:
                    failed[number] = str(error).partition("\n")[0]
    return [
        _row(job, statistics.median(read[1:]), times[number][1:], failed.get(number))
        for number, job in enumerate(jobs)
    ]


def _tokens(shape: Shape, device: torch.device) -> VisualTokens:
    generator = torch.Generator(device).manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(getattr(torch, shape.dtype))

    frames, height, width = shape.grid
    base = noise(height * width, shape.width)
    # Frame by frame, so that nothing but the features is as large as they are.
    features = base.new_empty(frames, height * width, shape.width)
    for frame in features:
        frame.copy_(base + 0.5 * noise(height * width, shape.width))
    return VisualTokens.from_grid(
        features.flatten(0, 1),
        shape.grid,
        saliency=noise(frames * height * width).abs(),
        text=noise(TEXT, shape.width),
        check=False,
    )


def _read(features: Tensor) -> float:
    watch = Stopwatch(features.device)
    features.sum()
    watch.lap()
    return watch.read()[0]


def _time(job: _Job, tokens: VisualTokens) -> tuple[float, float]:
    """Milliseconds of a plan, and of fusing by it."""
    watch = Stopwatch(tokens.features.device)
    with using_kernel(job.kernel):
        plan = job.strategy.plan(tokens)
    watch.lap()
    job.strategy.fuse(plan, tokens.features)
    watch.lap()
    first, second = watch.read()
    return first, second


def _row(
    job: _Job, read: float, times: Sequence[tuple[float, float]], reason: str | None
) -> MatchingRow:
    shape = job.shape
    figures: dict[str, Any] = {
        "kernel": job.kernel,
        "grid": shape.grid,
        "width": shape.width,
        "dtype": shape.dtype,
        "read_ms": read,
    }
    if reason is not None or not times:
        return MatchingRow.of(job.candidate, **figures | {"reason": reason})
    plans, fuses = zip(*times, strict=True)
    plan, fuse = statistics.median(plans), statistics.median(fuses)
    figures |= {"plan_ms": plan, "fuse_ms": fuse, "plan_range": (min(plans), max(plans))}
    figures |= {"reads": plan / read, "fuse_reads": fuse / read}
    return MatchingRow.of(job.candidate, **figures)
