"""``tokenfuse bench retention``: ask, then show."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from tokenfuse.bench.micro import write
from tokenfuse.bench.plot import check
from tokenfuse.bench.retention.ask import ask, lacking
from tokenfuse.bench.retention.figures import figures
from tokenfuse.bench.retention.page import page
from tokenfuse.bench.retention.plan import Plan, Setting, settings
from tokenfuse.bench.retention.records import Records
from tokenfuse.bench.retention.summary import Summary
from tokenfuse.errors import ConfigError
from tokenfuse.inference.json_lines import alone
from tokenfuse.registry import default_registry


def retention(
    plan: Plan,
    models: Mapping[str, Path],
    out: Path,
    *,
    ask_only: Sequence[str],
    command: str,
    err: Console,
) -> Path:
    """Ask the models in ``ask_only`` what ``out`` lacks; write the page of all models; its path.

    ``out``: a folder, with a file ``<model>.jsonl`` of answers each, ``index.md`` and pictures.
    Raises ConfigError or UnsupportedModelError.
    """
    out.mkdir(parents=True, exist_ok=True)
    check(out / "any.png")
    chosen = settings(plan, default_registry())
    if not any(map(plan.strata, plan.tasks)):
        raise ConfigError(
            f"no task of {', '.join(plan.tasks) or 'none'} makes sense under "
            f"{', '.join(plan.motions) or 'no motion'} in {plan.patches} patches: name others"
        )
    for name in ask_only:
        path = out / f"{name}.jsonl"
        with alone(path):
            _ask(name, models[name], plan, chosen, Records(path), err)
    held = [Records(out / f"{name}.jsonl") for name in models if (out / f"{name}.jsonl").exists()]
    summaries = [summary for records in held if (summary := Summary(records)).tasks]
    if not summaries:
        raise ConfigError(f"{out} holds no answers yet; expected a model to ask: name one")
    text = page(plan, chosen, summaries, figures(plan, chosen, summaries, out), command)
    write(out / "index.md", text)
    return out / "index.md"


def costs(plan: Plan, models: Mapping[str, Path], out: Path) -> list[dict[str, Any]]:
    """What each setting costs each model over all counted tasks, from the answers in ``out``.

    One mapping for each: the model, the configuration, the sweeps and the values by which it is a
    point of them, the questions, right answers without and with it, retention with its interval,
    McNemar's ``p``, and the share of visual tokens that is gone.
    """
    found = []
    for name in models:
        path = out / f"{name}.jsonl"
        if not path.exists():
            continue
        summary = Summary(Records(path))
        for setting in settings(plan, default_registry()):
            cost = summary.cost(setting.key)
            if cost is not None:
                about = {"model": name, "configuration": setting.configuration.describe()}
                figures = asdict(cost) | {"retention": cost.retention._asdict()}
                found.append(about | {"sweeps": setting.where} | figures)
    return found


def _ask(
    name: str,
    source: Path,
    plan: Plan,
    chosen: Sequence[Setting],
    records: Records,
    err: Console,
) -> None:
    missing = sum(
        len(plan.strata(task)) * plan.questions
        for task in plan.tasks
        for _ in lacking(plan, chosen, records, task)
    )
    bar = Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=err,
    )
    with bar:
        job = bar.add_task("loading the model", total=missing)
        ask(name, source, plan, chosen, records, functools.partial(_advance, bar, job))


def _advance(bar: Progress, job: TaskID, what: str, answers: int) -> None:
    bar.update(job, advance=answers, description=what)
