"""Curves over the share of tokens kept, a line or a panel per strategy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module  # matplotlib by name: type checkers run without it
from pathlib import Path
from typing import Any, NamedTuple

from tokenfuse.bench.candidates import CONTROLS
from tokenfuse.bench.compare import Comparison
from tokenfuse.bench.micro import Benchmark
from tokenfuse.errors import ConfigError

Point = tuple[float, float]

# Dark enough on white, and far apart for most eyes; with the markers every pair is unique.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b3294", "#8c2d04")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#8a8a8a"
_OTHERS = {"color": "#d9d9d9", "linewidth": 0.7, "zorder": 1}
TOGETHER = 8
"""Lines that can be told apart in one panel."""
COLUMNS = 4
"""Panels beside each other."""


class Curves(NamedTuple):
    """What to draw: points ``(kept, value)`` by strategy, and the level without compression."""

    lines: Mapping[str, Sequence[Point]]
    title: str
    value: str
    level: float | None = None
    log: bool = False
    less_is_better: bool = False


def comparison_curves(result: Comparison) -> Curves:
    """KL divergence against tokens kept."""
    lines: dict[str, list[Point]] = {}
    for row in result.rows:
        if row.kl is not None and row.kept is not None:
            lines.setdefault(row.strategy, []).append((row.kept, row.kl))
    return Curves(
        lines,
        f"First token's distribution: {result.question}",
        "KL(uncompressed || compressed), nats: lower is better",
        log=True,
        less_is_better=True,
    )


def benchmark_curves(result: Benchmark) -> Curves:
    """Accuracy over all tasks against tokens kept."""
    plain, *others = result.scores
    lines: dict[str, list[Point]] = {}
    for score in others:
        if score.accuracy is not None and score.kept is not None:
            lines.setdefault(score.strategy, []).append((score.kept, 100 * score.accuracy))
    return Curves(
        lines,
        f"Right answers, {len(plain.tasks)} tasks of {result.questions} questions each",
        "right answers, %",
        level=None if plain.accuracy is None else 100 * plain.accuracy,
    )


def check(path: Path) -> None:
    """Raise ConfigError unless a picture can be written to ``path``, before anything is run."""
    try:
        backend = import_module("matplotlib.backend_bases")
    except ImportError as error:
        raise ConfigError(
            "drawing needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    kinds = backend.FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise ConfigError(
            f"{path} has no suffix of a picture; expected one of: {', '.join(sorted(kinds))}"
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected a file: choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} lies in no folder: make {path.parent} first")


def draw(curves: Curves, path: Path) -> None:
    """Draw into a file whose suffix says of what kind: one panel, or one for each of many lines."""
    if len(curves.lines) > TOGETHER:
        _draw_apart(curves, path)
    else:
        _draw_together(curves, path)


def _draw_apart(curves: Curves, path: Path) -> None:
    """A panel for each strategy, in which the others are grey; all on the same axes."""
    lines = {name: sorted(points, reverse=True) for name, points in curves.lines.items() if points}
    # The best comes first, at the share that most of them kept.
    shares = Counter(round(100 * kept) for points in lines.values() for kept, _ in points)
    most = max(shares.values())
    share = min(share for share, count in shares.items() if count == most)
    sign = 1 if curves.less_is_better else -1

    def rank(name: str) -> float:
        return sign * min(lines[name], key=lambda point: abs(100 * point[0] - share))[1]

    rows = -(-len(lines) // COLUMNS)
    figure = import_module("matplotlib.figure").Figure(
        figsize=(2.45 * COLUMNS, 1.75 * rows + 0.7), layout="constrained"
    )
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    figure.suptitle(f"{curves.title}. Grey: all others", x=0.01, ha="left", fontsize=11)
    figure.supxlabel("visual tokens kept, %: fewer to the right", fontsize=10)
    figure.supylabel(curves.value, fontsize=10)
    for axes, name in zip(panels, sorted(lines, key=rank), strict=False):
        for points in lines.values():
            axes.plot([100 * kept for kept, _ in points], [y for _, y in points], **_OTHERS)
        points = lines[name]
        style = {"color": "#555555" if name in CONTROLS else _COLORS[0], "marker": "o"}
        x, y = [100 * kept for kept, _ in points], [y for _, y in points]
        axes.plot(x, y, linewidth=1.8, markersize=4, **style)
        title = f"{name} (control)" if name in CONTROLS else name
        axes.set_title(title, loc="left", fontsize=9, color=style["color"])
        axes.grid(color="#eeeeee", linewidth=0.7)
        axes.tick_params(labelsize=8)
        if curves.level is not None:
            axes.axhline(curves.level, color="black", linestyle=":", linewidth=1)
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(lines) - COLUMNS) : len(lines)]:
        axes.tick_params(labelbottom=True)
    first = panels[0]
    if curves.level is not None:
        across = first.get_yaxis_transform()
        first.text(0.99, curves.level, "uncompressed", transform=across, ha="right", fontsize=7)
    _scale(first, curves)
    figure.savefig(path, dpi=130)


def _draw_together(curves: Curves, path: Path) -> None:
    """All lines in one panel, labelled at their ends."""
    height = max(4.5, 0.235 * (len(curves.lines) + 3))
    figure = import_module("matplotlib.figure").Figure(figsize=(9.5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(curves.title, loc="left", fontsize=11)
    axes.set_xlabel("visual tokens kept, %: fewer to the right")
    axes.set_ylabel(curves.value)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lines = {name: sorted(points, reverse=True) for name, points in curves.lines.items()}
    styles = _styles(list(lines))
    for name, points in lines.items():
        axes.plot([100 * kept for kept, _ in points], [y for _, y in points], **styles[name])
    if curves.level is not None:
        axes.axhline(curves.level, color="black", linestyle=":", linewidth=1.2)
        across = axes.get_yaxis_transform()
        axes.text(0.01, curves.level, "uncompressed", transform=across, va="bottom", fontsize=8)
    _scale(axes, curves)
    _label(figure, axes, lines, styles)
    figure.savefig(path, dpi=150)


def _scale(axes: Any, curves: Curves) -> None:
    """Both axes: fewer tokens to the right, ticks at the shares that were asked for."""
    points = [point for points in curves.lines.values() for point in points]
    if curves.log:
        _logarithmic(axes, [y for _, y in points])
    axes.invert_xaxis()
    ticks = _apart([round(100 * kept) for kept, _ in points])
    if 1 < len(ticks) <= 8:
        axes.set_xticks(ticks)


def _apart(shares: Sequence[int]) -> list[int]:
    """The commonest shares, without those whose figures would stand on each other."""
    found: list[int] = []
    for share, _ in Counter(shares).most_common():
        if all(abs(share - other) >= 3 for other in found):
            found.append(share)
    return sorted(found)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        plain = name in CONTROLS
        i = len([other for other in styles if (other in CONTROLS) == plain])
        styles[name] = {
            "color": _GREY if plain else _COLORS[i % len(_COLORS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": "--" if plain else "-",
            "linewidth": 1.3,
            "markersize": 5,
            "markeredgecolor": "white",
            "markeredgewidth": 0.4,
            "clip_on": False,
            "zorder": 2 if plain else 3,
        }
    return styles


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if not positive:
        return
    if len(positive) == len(values):
        axes.set_yscale("log")
    else:
        # Nothing is lost at all in some runs: show that, too.
        axes.set_yscale("symlog", linthresh=min(positive))
        axes.set_ylim(bottom=0)


def _label(
    figure: Any,
    axes: Any,
    lines: Mapping[str, Sequence[Point]],
    styles: Mapping[str, dict[str, Any]],
) -> None:
    """Names at the right, each joined to the end of its line, in the order of the ends."""
    figure.canvas.draw()
    place = axes.transData + axes.transAxes.inverted()
    ends = {name: place.transform((100 * p[-1][0], p[-1][1])) for name, p in lines.items() if p}
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = _spread([ends[name][1] for name in order], 0.205 / (figure.get_figheight() - 1.1))
    for name, height in zip(order, heights, strict=True):
        style, end = styles[name], ends[name]
        outside = {"transform": axes.transAxes, "clip_on": False, "color": style["color"]}
        axes.plot([end[0], 1.06], [end[1], height], linewidth=0.6, alpha=0.7, **outside)
        axes.plot([1.07], [height], **{**style, "linestyle": "", **outside})
        color = "#555555" if name in CONTROLS else style["color"]
        axes.text(
            1.085, height, name, transform=axes.transAxes, va="center", fontsize=9, color=color
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights from 0 to 1, moved as little as it takes to be ``gap`` apart."""
    # Less the gaps below it, each height may stay level with the one before: isotonic regression.
    runs: list[tuple[float, int]] = []
    for i, height in enumerate(heights):
        total, count = height - i * gap, 1
        while runs and runs[-1][0] / runs[-1][1] > total / count:
            more, members = runs.pop()
            total, count = total + more, count + members
        runs.append((total, count))
    level = [total / count for total, count in runs for _ in range(count)]
    top = max(0.0, 1 - (len(heights) - 1) * gap)
    return [min(max(height, 0.0), top) + i * gap for i, height in enumerate(level)]
