"""The command line. Data goes to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenfuse.errors import ConfigError, TokenFuseError

app = typer.Typer(
    help="Fewer visual tokens for video-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench, name="bench")
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _errors() -> Iterator[None]:
    """Turn an error that tokenfuse raises on purpose into one line and exit status 2."""
    try:
        yield
    except TokenFuseError as error:
        _err.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


@app.command()
def run(
    video: Annotated[
        str | None, typer.Argument(help="Video file; a short clip of tokenfuse's own if left out.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="Strategy, preset or YAML file.")] = "ttf",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the strategy: threshold=0.8")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to sample, evenly in time.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second.")] = None,
    compare: Annotated[bool, typer.Option(help="Answer without compression too.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timings per median.")] = 3,
    as_json: Json = False,
) -> None:
    """Answer a question about a video, with and without compression."""
    with _errors():
        # Heavy imports only where a model runs.
        from tokenfuse.config import get_configuration
        from tokenfuse.inference.run import run as run_once
        from tokenfuse.micro import CHECKPOINT, SAMPLE, SAMPLE_QUESTION

        chosen = get_configuration(strategy, **_overrides(options or []))
        _quiet()
        with _err.status("starting") as status:
            result = run_once(
                video or SAMPLE,
                question or (SAMPLE_QUESTION if video is None else "What happens in the video?"),
                chosen,
                source=model or CHECKPOINT,
                frames=frames,
                fps=fps,
                compare=compare,
                max_new_tokens=max_new_tokens,
                repeats=repeats,
                say=status.update,
            )
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        _show(result)


@app.command()
def compare(
    video: Annotated[
        str | None, typer.Argument(help="Video file; a short clip of tokenfuse's own if left out.")
    ] = None,
    strategies: Annotated[
        list[str] | None,
        typer.Option(help="Strategies, presets or YAML files, with commas; all if left out."),
    ] = None,
    keep_ratio: Annotated[
        list[str] | None,
        typer.Option(help="Shares of tokens to keep, with commas; 0.33 if left out."),
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about the video.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; the micro Qwen3-VL if left out.")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to sample, evenly in time.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample per second.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer: 64.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timings per median: 3.")] = None,
    micro: Annotated[
        int | None,
        typer.Option(min=1, help="Count right answers instead, to so many questions per task."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --micro: name of a .json to resume from, an .md and a .png file."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--plot", help="Draw a curve per strategy into this file.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Compare strategies at equal numbers of tokens, on one video or on the micro model's tasks."""
    with _errors():
        import torch

        from tokenfuse.bench import show
        from tokenfuse.bench.candidates import listed, ratios

        for_video = {
            "VIDEO": video,
            "--question": question,
            "--frames": frames,
            "--fps": fps,
            "--max-new-tokens": max_new_tokens,
            "--repeats": repeats,
        }
        show.refuse(for_video, {"--out": out}, micro)
        _quiet()
        if threads:
            torch.set_num_threads(threads)
        names, shares = listed(strategies or []), ratios(keep_ratio or ["0.33"])
        if micro is None:
            show.one_video(
                _out,
                _err,
                video,
                question,
                names=names,
                ratios=shares,
                model=model,
                frames=frames,
                fps=fps,
                max_new_tokens=max_new_tokens or 64,
                repeats=repeats or 3,
                picture=picture,
                as_json=as_json,
            )
        else:
            show.micro_tasks(
                _out,
                _err,
                micro,
                names=names,
                ratios=shares,
                model=model,
                prefix=out,
                threads=threads,
                picture=picture,
                as_json=as_json,
            )


@bench.command()
def retention(
    out: Annotated[Path, typer.Option(help="Folder for answers, page and pictures.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of questions and sweeps; a short benchmark if left out."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="plain, robust or none (only write the page); both if left out."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU.")] = None,
) -> None:
    """What compression costs in answers, by task and by motion.

    A run that was stopped goes on from the answers in the folder.
    """
    with _errors():
        import torch

        from tokenfuse.bench.retention.plan import Plan, read_plan
        from tokenfuse.bench.retention.run import retention as run_retention
        from tokenfuse.micro import INSTRUMENTS

        names = list(INSTRUMENTS) if model is None else [m for m in model if m != "none"]
        for name in names:
            if name not in INSTRUMENTS:
                raise ConfigError(
                    f"--model {name} is none of {', '.join(INSTRUMENTS)}: only these answer the "
                    "questions; none asks no model"
                )
        _quiet()
        if threads:
            torch.set_num_threads(threads)
        options = f" --config {config}" if config else ""
        options += f" --threads {threads}" if threads else ""
        page = run_retention(
            read_plan(config) if config else Plan.model_validate({}),
            INSTRUMENTS,
            out,
            ask_only=names,
            command=f"tokenfuse bench retention{options} --out {out}",
            err=_err,
        )
    _out.print(str(page), soft_wrap=True)


@app.command()
def strategies(as_json: Json = False) -> None:
    """List the registered strategies."""
    with _errors():
        from tokenfuse.registry import default_registry
        from tokenfuse.strategies._vit import stages

        rows = [
            {
                "name": name,
                "stage": stages(entry.cls),
                "needs": sorted(entry.cls.needs),
                "from": entry.distribution,
                "about": _first_line(entry.cls),
            }
            for name, entry in sorted(default_registry().strategies.items())
        ]
    _list(rows, as_json)


@app.command()
def adapters(as_json: Json = False) -> None:
    """List the registered adapters."""
    with _errors():
        from tokenfuse.registry import default_registry

        rows = [
            {"name": name, "from": entry.distribution, "about": _first_line(entry.cls)}
            for name, entry in sorted(default_registry().adapters.items())
        ]
    _list(rows, as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, strategies of plugins included."""
    with _errors():
        from tokenfuse.config import json_schema

        print(json.dumps(json_schema(), indent=2))


def _overrides(options: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {option} is not of the form key=value, as in threshold=0.8")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {option}: {value!r} is not a YAML value") from None
    return values


def _quiet() -> None:
    """Leave the terminal to the report: no progress bars or advice from transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, style="bold" if column == "name" else None, no_wrap=True)
    cells = [[", ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *cells, strict=True)]
    # The last column, a description, is cut where the terminal ends; --json has it whole.
    room = max(20, _out.width - sum(widths[:-1]) - 2 * len(widths))
    for *short, about in cells:
        table.add_row(*short, about if len(about) <= room else about[: room - 1] + "…")
    _out.print(table, crop=False)


def _show(result: Any) -> None:
    from tokenfuse.costs import flops, size
    from tokenfuse.micro import CHECKPOINT, SAMPLE

    report = result.report
    own = {str(SAMPLE): "tokenfuse's sample clip", str(CHECKPOINT): "the micro Qwen3-VL"}
    video, model = (own.get(name, name) for name in (result.video, result.model))
    options = {k: v for k, v in report.strategy.items() if v is not None and k != "strategy"}
    _out.print(
        f"[bold]{escape(result.question)}[/]\n"
        f"{escape(video)}: {result.frames} frames of {result.duration:.1f} s; "
        f"{escape(model)} on {result.device} in {result.dtype}",
        soft_wrap=True,
    )
    _out.print(
        f"[bold]{report.strategy['strategy']}[/] "
        + escape(", ".join(f"{key} {value}" for key, value in options.items())),
        soft_wrap=True,
    )
    for item in report.items:
        _bars(item, result)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("uncompressed", justify="right")
    table.add_column(report.strategy["strategy"], justify="right", style="bold")
    table.add_column("change", justify="right")
    before, after = result.uncompressed, result.compressed
    if before:
        table.add_row("answer", escape(before.text), escape(after.text), _same(result))
    else:
        table.add_row("answer", "", escape(after.text), "")
    pairs = (
        ("visual tokens", report.tokens_before, report.tokens_after, str),
        ("prompt tokens", sum(report.prompt_before), sum(report.prompt_after), str),
        ("KV cache", report.kv_cache_bytes_before, report.kv_cache_bytes_after, size),
        ("prefill", report.prefill_flops_before, report.prefill_flops_after, flops),
    )
    for name, old, new, text in pairs:
        table.add_row(name, text(old), text(new), _change(old, new))
    old_ms = before.ttft_ms if before else None
    table.add_row(
        "time to first token",
        f"{old_ms:.1f} ms" if old_ms else "",
        f"{after.ttft_ms:.1f} ms",
        _speed(old_ms, after.ttft_ms) if old_ms else "",
    )
    _out.print(table)
    _out.print(
        f"of which compression itself: matching {flops(report.matching_flops)} in "
        f"{report.plan_ms:.1f} ms, realignment {report.realign_ms:.1f} ms"
    )
    if report.reason:
        _out.print(f"[yellow]not compressed[/]: {escape(report.reason)}")


def _bars(item: Any, result: Any) -> None:
    """Survivors of every frame as a bar."""
    total, width = item.frame_tokens_before, 36
    per_patch = max(1, len(result.timestamps) // item.grid[0])
    for frame, kept in enumerate(item.frame_tokens_after):
        pair = result.timestamps[frame * per_patch : (frame + 1) * per_patch]
        seconds = sum(pair) / len(pair) if pair else 0.0
        full = round(width * kept / total)
        _out.print(
            f"{seconds:6.2f} s [green]{'█' * full}[/][dim]{'░' * (width - full)}[/] {kept}/{total}"
        )


def _same(result: Any) -> str:
    return "[green]same[/]" if result.same_answer else "[red]differs[/]"


def _change(old: int, new: int) -> str:
    return f"{(new - old) / old:+.1%}" if old else ""


def _speed(old: float, new: float) -> str:
    if abs(old - new) < 0.005 * old:
        return "even"
    return f"{old / new:.2f}x faster" if new <= old else f"[red]{new / old:.2f}x slower[/]"


if __name__ == "__main__":
    app()
