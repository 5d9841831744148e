"""The retention benchmark as a page of the documentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenfuse.bench.markdown import NONE, shell, table
from tokenfuse.bench.paired import Interval
from tokenfuse.bench.retention.plan import BLIND, CHECKS, UNDECIDED, Plan, Setting
from tokenfuse.bench.retention.summary import (
    COUNTED,
    GROUPS,
    Summary,
    chance,
    in_group,
    in_stratum,
    label,
)
from tokenfuse.config import KEY
from tokenfuse.costs import versions

BEYOND_CHANCE = 0.01

PAGE = """\
# Retention

What compression costs in answers: {tasks} tasks under {motions} motions, {questions} clips of
{patches} temporal patches of each stratum, held-out seeds. *Retention* is right answers with
compression ÷ right answers without, on the same questions, over the tasks of which the model
answers {counted:.0%} or more without compression; in brackets the 95 % bootstrap interval; *p* is
McNemar's exact test against the uncompressed run. An answer counts if it is right to the letter.

`plain` has never seen a prompt with missing tokens; `robust` was fine-tuned on such. Both have the
same vision tower. What `plain` alone loses is, for the most part, unfamiliar input. What all this
means is in [Does compression cost answers?]({about}).

{pictures}{left_out}
## Without compression

Right answers. *Blind*: every visual token removed; *undecided*: those of the decisive temporal
patches removed, for the subtle tasks (from `hue` on). Neither may be better than chance; a model
that gives no answer of the task at all scores 0.

{plain}
{sweeps}
{focus}
## How it was measured

```console
{command}
```

A run that is killed goes on where it stopped. On {device} in {dtype}; {versions}.
"""


def page(
    plan: Plan,
    chosen: Sequence[Setting],
    models: Sequence[Summary],
    pictures: Sequence[tuple[str, str]],
    command: str,
) -> str:
    """Tables of all models; ``pictures`` are pairs of a caption and a file beside the page."""
    header = models[0].records.header
    if header is None:
        raise RuntimeError("records without a header have no answers to show")
    sweeps = []
    for sweep in plan.sweeps:
        points = [s for s in chosen if sweep.name in s.where]
        if any(model.has(s.key) for s in points for model in models):
            about = f"{sweep.about}\n\n" if sweep.about else ""
            sweeps.append(f"## {sweep.name}\n\n{about}" + _sweep(sweep.name, points, models))
    focus = []
    for name in plan.focus:
        setting = next(s for s in chosen if name in s.where)
        focus += [_strata(name, setting, model, plan) for model in models if model.has(setting.key)]
    return PAGE.format(
        tasks=len(models[0].tasks),
        motions=len(plan.motions),
        questions=plan.questions,
        patches=plan.patches,
        counted=COUNTED,
        about="../../explanation/retention.md",
        pictures="\n".join(f"![{caption}]({file})\n" for caption, file in pictures),
        left_out=_left_out(plan),
        plain=_uncompressed(models),
        sweeps="\n".join(sweeps),
        focus="\n".join(focus),
        command=shell(command),
        device=header.device,
        dtype=header.dtype,
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def _left_out(plan: Plan) -> str:
    """Which tasks were not asked, and why."""
    names = [task for task in plan.tasks if not plan.strata(task)]
    if not names:
        return ""
    return (
        "\nNot asked, because they make no sense under these motions or in "
        f"{plan.patches} patches: {', '.join(names)}.\n"
    )


def _uncompressed(models: Sequence[Summary]) -> str:
    columns = ["task", "chance"]
    for model in models:
        columns += [model.model, f"{model.model}, {BLIND}", f"{model.model}, {UNDECIDED}"]
    rows = []
    for task in models[0].tasks:
        row = [task, _share(chance(task))]
        for model in models:
            mark = "" if task in model.counted else " (not counted)"
            row.append(_share(model.accuracy(task)) + mark)
            row += [_interval(model.check(c, task)) for c in CHECKS]
        rows.append(row)
    return table(columns, rows)


def _sweep(name: str, points: Sequence[Setting], models: Sequence[Summary]) -> str:
    """Overall and by motion group, then by task; a row for each model and point."""
    first, second = [], []
    several = len({s.where[name][KEY] for s in points}) > 1
    for setting in points:
        point = setting.where[name]
        title = label(point) or NONE
        if several:
            title = f"`{point[KEY]}`" + (f", {title}" if len(point) > 1 else "")
        for model in models:
            cost = model.cost(setting.key)
            if cost is None or not model.has(setting.key):
                continue
            by = {task: _on_task(model, setting.key, task) for task in model.counted}
            worst = min(by, key=lambda task: by[task])
            groups = [model.cost(setting.key, in_group(model, g)) for g in GROUPS]
            first.append(
                [
                    title,
                    model.model,
                    _share(cost.removed),
                    _share(cost.after),
                    f"{_share(cost.retention.value)} {_bounds(cost.retention)}",
                    f"{cost.p:.1g}" if cost.p else "< 1e-300",
                    *(_share(g.retention.value) if g else NONE for g in groups),
                    f"{worst} {_share(by[worst])}",
                ]
            )
            second.append(
                [title, model.model, *(_share(by.get(task, math.nan)) for task in model.tasks)]
            )
    columns = ["setting", "model", "removed", "right", "retention", "p"]
    columns += [f"{g} motion" for g in GROUPS] + ["worst task"]
    return (
        table(columns, first, left=2)
        + "\nRetention by task:\n\n"
        + table(["setting", "model", *models[0].tasks], second, left=2)
    )


def _strata(name: str, setting: Setting, model: Summary, plan: Plan) -> str:
    rows = []
    for task in model.tasks:
        row = [task]
        for motion in plan.motions:
            cost = model.cost(setting.key, in_stratum(task, motion))
            value = _share(cost.retention.value) if cost else NONE
            row.append(f"**{value}**" if cost and cost.p < BEYOND_CHANCE else value)
        rows.append(row)
    return (
        f"## {name}, by stratum: {model.model}\n\nRetention, {plan.questions} questions each; bold "
        f"where *p* is below {BEYOND_CHANCE}.\n\n" + table(["task", *plan.motions], rows)
    )


def _on_task(model: Summary, setting: str, task: str) -> float:
    cost = model.cost(setting, in_stratum(task))
    return cost.retention.value if cost else math.nan


def _share(value: float) -> str:
    return NONE if math.isnan(value) else f"{100 * value:.1f}"


def _bounds(interval: Interval) -> str:
    return f"[{_share(interval.low)}, {_share(interval.high)}]"


def _interval(interval: Interval | None) -> str:
    return f"{_share(interval.value)} {_bounds(interval)}" if interval else NONE
