"""Three pictures: accuracy against kept tokens, threshold × window, retention by motion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module  # matplotlib by name: type checkers run without it
from pathlib import Path
from typing import Any

from tokenfuse.bench.plot import Curves, draw
from tokenfuse.bench.retention.plan import Plan, Setting, Sweep
from tokenfuse.bench.retention.summary import GROUPS, Summary, in_group
from tokenfuse.config import KEY


def figures(
    plan: Plan, chosen: Sequence[Setting], models: Sequence[Summary], folder: Path
) -> list[tuple[str, str]]:
    """Draw what the plan has answers for into ``folder``: pairs of a caption and a file name."""
    drawn = []
    for sweep in plan.sweeps:
        points = [s for s in chosen if sweep.name in s.where]
        if "keep_ratio" in sweep.grid and len({s.where[sweep.name][KEY] for s in points}) > 1:
            drawn += list(_accuracy(sweep, points, models, folder))
        if {"threshold", "window"} <= sweep.grid.keys():
            drawn += list(_heat(sweep, points, models, folder))
    focused = [(name, s) for name in plan.focus for s in chosen if name in s.where]
    if focused and (made := _motion(focused, models, folder)):
        drawn.append(made)
    return drawn


def _accuracy(
    sweep: Sweep, points: Sequence[Setting], models: Sequence[Summary], folder: Path
) -> Iterator[tuple[str, str]]:
    for model in models:
        lines: dict[str, list[tuple[float, float]]] = {}
        level = None
        for setting in points:
            cost = model.cost(setting.key) if model.has(setting.key) else None
            if cost:
                name = setting.where[sweep.name][KEY]
                lines.setdefault(name, []).append((1 - cost.removed, 100 * cost.after))
                level = 100 * cost.before
        if lines:
            file = f"{sweep.name}-{model.model}.png"
            title = f"Right answers of the {model.model} model, {len(model.counted)} tasks"
            draw(Curves(lines, title, "right answers, %", level=level), folder / file)
            yield f"Right answers of the {model.model} model against the share of tokens kept", file


def _heat(
    sweep: Sweep, points: Sequence[Setting], models: Sequence[Summary], folder: Path
) -> Iterator[tuple[str, str]]:
    """Retention for every threshold and window, a panel per model, and what is removed."""
    able = [model for model in models if all(model.has(s.key) for s in points)]
    thresholds, windows = sweep.grid["threshold"], sweep.grid["window"]
    if not able:
        return
    figure, axes = _panels(len(able) + 1, 4.2)
    place = {
        (s.where[sweep.name]["threshold"], s.where[sweep.name]["window"]): s.key for s in points
    }
    panels: list[tuple[str, Summary, bool]] = [(f"retention, {m.model}, %", m, False) for m in able]
    panels.append(("visual tokens removed, %", able[0], True))
    tables = []
    for _, model, removed in panels:
        costs = [[model.cost(place[t, w]) for w in windows] for t in thresholds]
        tables.append(
            [
                [100 * (c.removed if removed else c.retention.value) if c else 0 for c in row]
                for row in costs
            ]
        )
    # One scale for all models.
    least = min(value for table in tables[:-1] for row in table for value in row)
    for axis, (title, _, removed), table in zip(axes, panels, tables, strict=True):
        low, high = (min(map(min, table)), max(map(max, table))) if removed else (least, 100)
        colors = "Greys" if removed else "viridis"
        axis.imshow(table, aspect="auto", cmap=colors, vmin=low, vmax=high)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks(range(len(windows)), [f"{w}×{w}" for w in windows])
        axis.set_yticks(range(len(thresholds)), [f"{t:g}" for t in thresholds])
        axis.set_xlabel("window")
        axis.set_ylabel("threshold")
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                dark = (value - low) < 0.5 * (high - low)
                color = "white" if dark != removed else "black"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    file = f"{sweep.name}.png"
    figure.savefig(folder / file, dpi=130)
    yield "Retention for every threshold and window", file


def _motion(
    focused: Sequence[tuple[str, Setting]], models: Sequence[Summary], folder: Path
) -> tuple[str, str] | None:
    """Retention in each group of measured motion with its interval, a panel per model."""
    able = [model for model in models if all(model.has(s.key) for _, s in focused)]
    if not able:
        return None
    figure, axes = _panels(len(able), 4.6)
    for axis, model in zip(axes, able, strict=True):
        for i, (name, setting) in enumerate(focused):
            costs = [model.cost(setting.key, in_group(model, group)) for group in GROUPS]
            found = [(x, c.retention) for x, c in enumerate(costs) if c]
            x = [at + 0.08 * (i - (len(focused) - 1) / 2) for at, _ in found]
            y = [100 * r.value for _, r in found]
            bars = [
                [100 * (r.value - r.low) for _, r in found],
                [100 * (r.high - r.value) for _, r in found],
            ]
            axis.errorbar(
                x, y, yerr=bars, marker="o", markersize=4, capsize=2, label=_label(name, setting)
            )
        axis.set_xticks(range(len(GROUPS)), ["< ½", "½ to 1", "> 1"])
        axis.set_xlabel("measured motion, tokens per temporal patch")
        axis.set_ylabel("retention, %")
        axis.set_title(model.model, loc="left", fontsize=10)
        axis.grid(color="#e6e6e6", linewidth=0.8)
    low, high = (f(y for axis in axes for y in axis.get_ylim()) for f in (min, max))
    for axis in axes:
        axis.set_ylim(low, high)
    lines, names = axes[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 2}
    figure.legend(lines, names, fontsize=8, frameon=False, **place)
    figure.savefig(folder / "motion.png", dpi=130)
    return "Retention by measured motion", "motion.png"


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    figure = import_module("matplotlib.figure").Figure(
        figsize=(4.6 * count, height), layout="constrained"
    )
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _label(name: str, setting: Setting) -> str:
    """A sweep's name, and which strategy that is."""
    return f"{name}: {setting.configuration.strategy}"
