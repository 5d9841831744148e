"""The command ``tokenfuse compare``: its steps, and its results for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenfuse.bench import plot
from tokenfuse.bench.candidates import CONTROLS, UNCOMPRESSED, Row
from tokenfuse.bench.compare import Comparison, compare
from tokenfuse.bench.micro import Benchmark, benchmark, write
from tokenfuse.bench.page import page
from tokenfuse.costs import size
from tokenfuse.errors import ConfigError
from tokenfuse.inference.measure import Say
from tokenfuse.micro import CHECKPOINT, SAMPLE, SAMPLE_QUESTION

NONE = "–"
ENDINGS = (".json", ".md", ".png")


def one_video(
    out: Console,
    err: Console,
    video: str | None,
    question: str | None,
    *,
    picture: Path | None,
    as_json: bool,
    model: str | None,
    **options: Any,
) -> None:
    """Compare on one video, tokenfuse's own if none is given. Raises TokenFuseError."""
    if picture:
        plot.check(picture)
    asked = question or (SAMPLE_QUESTION if video is None else "What happens in the video?")
    with _progress(err) as say:
        result = compare(video or SAMPLE, asked, source=model or CHECKPOINT, say=say, **options)
    if picture:
        plot.draw(plot.comparison_curves(result), picture)
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    out.print(
        f"[bold]{escape(result.question)}[/]\n"
        f"{_own(result.video)}: {result.frames} frames of {result.duration:.1f} s; "
        f"{_own(result.model)} on {result.device} in {result.dtype}",
        soft_wrap=True,
    )
    _print_table(out, _comparison_table(result))
    for row in result.rows:
        if row.reason:
            _print_reason(out, row)


def micro_tasks(
    out: Console,
    err: Console,
    questions: int,
    *,
    names: Sequence[str],
    ratios: Sequence[float],
    model: str | None,
    picture: Path | None,
    prefix: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare on the micro model's tasks; ``prefix`` names a JSON, a Markdown and a PNG file.

    Raises TokenFuseError.
    """
    files = _files(prefix) if prefix else {}
    pictures = [path for path in (files.get(".png"), picture) if path]
    for path in pictures:
        plot.check(path)
    with _progress(err) as say:
        result = benchmark(
            questions,
            names,
            ratios,
            source=model or CHECKPOINT,
            keep=files.get(".json"),
            say=say,
        )
    for path in pictures:
        plot.draw(plot.benchmark_curves(result), path)
    if prefix:
        options = {
            "--micro": str(questions),
            "--strategies": ",".join(names or ["all"]),
            "--keep-ratio": ",".join(f"{ratio:g}" for ratio in ratios),
            "--model": model,
            "--threads": str(threads or ""),
            "--out": prefix.as_posix(),
        }
        words = [word for name, value in options.items() if value for word in (name, value)]
        command = shlex.join(["tokenfuse", "compare", *words])
        write(files[".md"], page(result, files[".png"].name, command))
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    out.print(
        f"right answers to {questions} questions of each task; {_own(result.model)} on "
        f"{result.device} in {result.dtype}",
        soft_wrap=True,
    )
    _print_table(out, _benchmark_table(result))
    for score in result.scores:
        if score.reason:
            _print_reason(out, score)


def _files(prefix: Path) -> dict[str, Path]:
    if prefix.name in ("", ".."):
        raise ConfigError(f"--out {prefix} is a folder; expected a name: {prefix / 'scores'}")
    files = {end: prefix.with_name(prefix.name + end) for end in ENDINGS}
    for path in files.values():
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; expected a file: choose another --out")
    return files


def refuse(
    for_video: Mapping[str, object], for_micro: Mapping[str, object], micro: int | None
) -> None:
    """Raise ConfigError where an option is given that only the other kind of comparison has."""
    others, advice = (
        (for_micro, "goes with --micro: add --micro 50, or leave it out")
        if micro is None
        else (for_video, "does not go with --micro, which asks its own questions: leave it out")
    )
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} {advice}")


def _comparison_table(result: Comparison) -> Table:
    table = _table(
        "strategy",
        "asked",
        "tokens",
        "answer",
        "same",
        "KL, nats",
        "matching",
        "first token",
        "",
        "peak",
    )
    for row in result.rows:
        asked = NONE if row.keep_ratio is None else f"{row.keep_ratio:g}"
        if row.answer is None:
            table.add_row(escape(row.strategy), asked, NONE, "[yellow]cannot run[/]")
            continue
        plain = row.strategy == UNCOMPRESSED.label
        cells = [
            escape(row.strategy),
            asked,
            str(row.tokens) if plain else f"{row.tokens} ({row.kept:.1%})",
            escape(row.answer),
            NONE if plain else "[green]yes[/]" if row.same_answer else "[red]no[/]",
            _number(row.kl, ".3g"),
            _number(row.plan_ms, ".1f", " ms"),
            _number(row.ttft_ms, ".1f", " ms"),
            "" if plain else _number(row.speedup, ".2f", "x"),
            NONE if row.peak_bytes is None else size(row.peak_bytes),
        ]
        table.add_row(*cells)
    return table


def _benchmark_table(result: Benchmark) -> Table:
    plain = result.scores[0]
    table = _table("strategy", "asked", "kept", "all", *plain.tasks, "same", "KL, nats", "matching")
    for score in result.scores:
        asked = NONE if score.keep_ratio is None else f"{score.keep_ratio:g}"
        if score.accuracy is None:
            table.add_row(escape(score.strategy), asked, NONE, "[yellow]cannot run[/]")
            continue
        shares = (
            task and _number(100 * task.right / task.questions, ".0f")
            for task in map(score.tasks.get, plain.tasks)
        )
        control = score.strategy in CONTROLS
        table.add_row(
            f"[dim]{score.strategy}[/]" if control else escape(score.strategy),
            asked,
            _number(score.kept, ".1%"),
            _number(100 * score.accuracy, ".1f"),
            *(share or NONE for share in shares),
            NONE if score is plain else _number(score.agreement, ".0%"),
            NONE if score is plain else _number(score.kl, ".3f"),
            NONE if score is plain else _number(score.plan_ms, ".2f", " ms"),
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        left = column in ("strategy", "answer")
        bold = "bold" if column == "strategy" else None
        table.add_column(
            column, justify="left" if left else "right", style=bold, no_wrap=column != "answer"
        )
    return table


def _print_table(out: Console, table: Table) -> None:
    if out.is_terminal:
        out.print(table)
        return
    # A file has no width.
    wide = out.measure(table, options=out.options.update(width=10_000)).maximum
    Console(file=out.file, width=wide, highlight=False).print(table)


def _print_reason(out: Console, row: Row) -> None:
    at = "" if row.keep_ratio is None else f" at {row.keep_ratio:g}"
    reason = escape(row.reason or "")
    out.print(f"[yellow]{escape(row.strategy)}{at}[/]: {reason}", soft_wrap=True)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _own(name: str) -> str:
    own = {
        str(SAMPLE): "tokenfuse's sample clip",
        str(CHECKPOINT): "the micro Qwen3-VL",
        "tokenfuse.micro": "the micro Qwen3-VL",
    }
    return own.get(name, escape(name))


@contextmanager
def _progress(err: Console) -> Iterator[Say]:
    """Where steps are told: one changing line on a terminal, else a line each."""
    if err.is_terminal:
        with err.status("starting") as status:
            yield status.update
    else:
        yield lambda text: err.print(text, markup=False, soft_wrap=True)
