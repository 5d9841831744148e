"""Results as tables on a console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenfuse.bench.candidates import CONTROLS, UNCOMPRESSED, Row
from tokenfuse.bench.compare import Comparison
from tokenfuse.bench.markdown import NONE
from tokenfuse.bench.micro import OWN_MODEL, Benchmark
from tokenfuse.config import KEY, PROMPT_OPTIONS, Configuration
from tokenfuse.costs import flops, size
from tokenfuse.inference.run import RunResult, VideoQuestion
from tokenfuse.micro import CHECKPOINT, SAMPLE
from tokenfuse.registry import default_registry
from tokenfuse.report import ItemReport, by_layer

MICRO = (str(CHECKPOINT), OWN_MODEL)
"""What results call the micro model."""
AT_SIZE = 3.2
"""How many times as fast ``ttf`` at a third made the prefill in docs/results/speed.md."""
LEFT = ("", "strategy", "answer")
"""Heads of columns that hold text; the others hold numbers."""
OWN = {
    str(SAMPLE): "tokenfuse's sample clip",
    str(CHECKPOINT): "the micro Qwen3-VL",
    OWN_MODEL: "the micro Qwen3-VL",
}


def print_run(out: Console, result: RunResult) -> None:
    """One answer with compression and without: bars of survivors, and what is saved and spent."""
    report, before, after = result.report, result.uncompressed, result.compressed
    name = report.strategy[KEY]
    _print_head(out, result)
    out.print(f"[bold]{escape(name)}[/]{escape(_options(report.strategy))}", soft_wrap=True)
    for item in report.items:
        _print_bars(out, item, result.timestamps)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("uncompressed", justify="right")
    table.add_column(name, justify="right", style="bold")
    table.add_column("change", justify="right")
    same = "[green]same[/]" if result.same_answer else "[red]differs[/]"
    if before:
        table.add_row("answer", escape(before.text), escape(after.text), same)
    else:
        table.add_row("answer", "", escape(after.text), "")
    # Inside the LLM layers read fewer and fewer: on average.
    read = report.tokens_after
    if report.layer_tokens is not None:
        read = round(report.layer_average * report.tokens_before)
    pairs = (
        ("visual tokens", report.tokens_before, read, str),
        ("prompt tokens", sum(report.prompt_before), sum(report.prompt_after), str),
        ("KV cache", report.kv_cache_bytes_before, report.kv_cache_bytes_after, size),
        ("prefill", report.prefill_flops_before, report.prefill_flops_after, flops),
    )
    for what, old, new, text in pairs:
        table.add_row(what, text(old), text(new), f"{(new - old) / old:+.1%}" if old else "")
    table.add_row(
        "time to first token",
        _number(before.ttft_ms, ".1f", " ms") if before else "",
        _number(after.ttft_ms, ".1f", " ms"),
        _speed(before.ttft_ms, after.ttft_ms) if before else "",
    )
    out.print(table)
    out.print(
        f"of which compression itself: matching {flops(report.matching_flops)} in "
        f"{report.plan_ms:.1f} ms, realignment {report.realign_ms:.1f} ms"
    )
    if report.tower_tokens is not None:
        saved = flops(report.tower_flops_before), flops(report.tower_flops_after)
        out.print(
            f"in the vision tower: visual tokens of {by_layer(report.tower_tokens, 'block')}, "
            f"{' -> '.join(saved)}, chosen in {report.tower_ms:.1f} ms"
        )
    if report.layer_tokens is not None:
        out.print(
            f"in the LLM: visual tokens of {by_layer(report.layer_tokens)}, chosen in "
            f"{report.score_ms:.1f} ms; above is the average of all layers"
        )
    if result.model in MICRO:
        out.print(
            "so small a model says little about time: 4 layers of the size of Qwen3-VL-2B read "
            f"4,096 visual tokens {AT_SIZE} times as fast with ttf at a third of them, on two CPU "
            "cores; tokenfuse bench speed measures it here",
            soft_wrap=True,
        )
    for hint in dict.fromkeys(item.hint for item in report.items if item.hint):
        out.print(f"[yellow]hint[/]: {escape(hint)}", soft_wrap=True)
    if report.reason:
        out.print(f"[yellow]not compressed[/]: {escape(report.reason)}", soft_wrap=True)


def print_comparison(out: Console, result: Comparison) -> None:
    """A row for each strategy and ratio, and why some could not run."""
    columns = ("strategy", "asked", "tokens", "answer", "same", "KL, nats", "matching")
    table = _table(*columns, "first token", "", "peak")
    for row in result.rows:
        asked = _number(row.keep_ratio, "g")
        if row.answer is None:
            table.add_row(escape(row.strategy), asked, NONE, "[yellow]cannot run[/]")
            continue
        plain = row.strategy == UNCOMPRESSED.label
        table.add_row(
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
        )
    _print_head(out, result)
    print_table(out, table)
    _print_reasons(out, result.rows)


def print_benchmark(out: Console, result: Benchmark) -> None:
    """Right answers in per cent, in all and by task, a row for each strategy and ratio."""
    plain = result.scores[0]
    table = _table("strategy", "asked", "kept", "all", *plain.tasks, "same", "KL, nats", "matching")
    for score in result.scores:
        asked = _number(score.keep_ratio, "g")
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
    out.print(
        f"right answers to {result.questions} questions of each task; {_own(result.model)} on "
        f"{result.device} in {result.dtype}",
        soft_wrap=True,
    )
    print_table(out, table)
    _print_reasons(out, result.scores)


def print_list(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mappings with the same keys as rows; the last column wraps where the terminal ends."""
    table = Table(box=None, pad_edge=False)
    *first, last = rows[0]
    for column in first:
        table.add_column(column, style="bold" if column == "name" else None, no_wrap=True)
    table.add_column(last)
    for row in rows:
        cells = (", ".join(v) if isinstance(v, list) else str(v) for v in row.values())
        table.add_row(*map(escape, cells))
    print_table(out, table)


def print_cells(out: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of texts under their heads; the first column holds names, the others figures."""
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    print_table(out, table)


def print_table(out: Console, table: Table) -> None:
    """Print a table as wide as the terminal, or as it needs where there is none."""
    if out.is_terminal:
        out.print(table)
        return
    wide = out.measure(table, options=out.options.update(width=10_000)).maximum
    Console(file=out.file, width=wide, highlight=False).print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in LEFT else "right",
            style="bold" if column == "strategy" else None,
            no_wrap=column == "strategy",
            overflow="fold",
        )
    return table


def _print_head(out: Console, result: VideoQuestion) -> None:
    several = result.frames < result.total_frames
    frames = (
        f"{result.frames} of {result.total_frames} frames" if several else f"{result.frames} frames"
    )
    out.print(
        f"[bold]{escape(result.question)}[/]\n"
        f"{_own(result.video)}: {frames} of {result.duration:.1f} s; "
        f"{_own(result.model)} on {result.device} in {result.dtype}",
        soft_wrap=True,
    )


def _print_bars(out: Console, item: ItemReport, timestamps: Sequence[float]) -> None:
    """Survivors of every frame as a bar."""
    total, width = item.frame_tokens_before, 36
    try:
        filled, empty = "█", "░"
        f"{filled}{empty}".encode(out.encoding)
    except UnicodeEncodeError:
        filled, empty = "#", "."
    per_patch = max(1, len(timestamps) // item.grid[0])
    for frame, kept in enumerate(item.frame_tokens_after):
        pair = timestamps[frame * per_patch : (frame + 1) * per_patch]
        seconds = sum(pair) / len(pair) if pair else 0.0
        full = round(width * kept / total)
        rest = width - full
        out.print(
            f"{seconds:6.2f} s [green]{filled * full}[/][dim]{empty * rest}[/] {kept}/{total}"
        )


def _print_reasons(out: Console, rows: Sequence[Row]) -> None:
    for row in rows:
        if row.reason:
            at = "" if row.keep_ratio is None else f" at {row.keep_ratio:g}"
            reason = escape(row.reason)
            out.print(f"[yellow]{escape(row.strategy)}{at}[/]: {reason}", soft_wrap=True)


def _options(strategy: Mapping[str, Any]) -> str:
    """The options of a described strategy that are not its defaults, as YAML on one line."""
    changed = _changed(strategy)
    if isinstance(changed, str):
        return ""
    del changed[KEY]
    text = yaml.safe_dump(changed, default_flow_style=True, sort_keys=False, width=10_000)
    return f" {text.strip()}"


def _changed(described: Mapping[str, Any]) -> dict[str, Any] | str:
    """A described strategy without its defaults, or its name alone where nothing else is left."""
    entry = default_registry().strategies.get(described[KEY])
    fields = entry.cls.model_fields if entry else {}
    usual = {name: getattr(Configuration, name) for name in PROMPT_OPTIONS} | {
        name: field.get_default(call_default_factory=True) for name, field in fields.items()
    }
    changed = {
        key: value for key, value in described.items() if key not in usual or value != usual[key]
    }
    if len(changed) == 1:
        return str(described[KEY])
    return {key: _inside(value) for key, value in changed.items()}


def _inside(value: Any) -> Any:
    """An option's value, in which strategies may stand."""
    if isinstance(value, list):
        return [_inside(each) for each in value]
    return _changed(value) if isinstance(value, Mapping) and KEY in value else value


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _speed(old: float, new: float) -> str:
    if abs(old - new) < 0.005 * old:
        return "even"
    return f"{old / new:.2f}x faster" if new <= old else f"[red]{new / old:.2f}x slower[/]"


def _own(name: str) -> str:
    return OWN.get(name, escape(name))
