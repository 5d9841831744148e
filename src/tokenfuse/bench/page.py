"""The micro model's scores as a page of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenfuse.bench.candidates import CONTROLS
from tokenfuse.bench.markdown import NONE, shell, table
from tokenfuse.bench.micro import OWN_MODEL, Benchmark, Score, interval
from tokenfuse.config import get_configuration
from tokenfuse.micro.build import TOKENS_PER_FRAME
from tokenfuse.micro.tasks import HELD_OUT_PATCHES
from tokenfuse.registry import default_registry

PAGE = """\
# Strategies on the micro model

Right answers of {model}, on {questions} questions of each of {tasks} tasks about clips of held-out
seeds, {first} to {last} temporal patches long. Every strategy gets the same clips and questions and
is asked to keep the same share of tokens, of those that a decoder layer reads on average where it
acts [inside the LLM](../explanation/inside-the-llm.md); everything else is its default. An answer
counts if it is right to the letter. {controls} are controls that hardly look at the tokens.

![Right answers against the share of tokens kept, strategy by strategy]({picture})

The model is very small, has never seen a prompt with missing tokens, and looks at synthetic clips:
that one strategy beats another here does not say that it will on a large model.

## All tasks

In parentheses: Wilson's 95 % interval of {total} questions. The questions are the same for all, so
that two strategies differ by less chance than their intervals suggest. Uncompressed: {plain}.
Sorted by the last column.

{overall}
{kept}{hints}
## What changes

How many answers equal the uncompressed model's, right or wrong; and in parentheses the mean
KL(uncompressed || compressed) of the first token's distribution, in nats.

{agreement}
## By task

Right answers in per cent of {questions}; Wilson's 95 % interval is ±{margin:.0f} points at half of
them, narrower elsewhere.

{by_task}
## Time of matching

Mean milliseconds per clip from features to fused features, and of choosing inside the LLM; the
vision tower and the rest of the LLM left out, on {device} in {dtype}, measured in passing: trust
the order of magnitude. A clip of the micro model has 144 to 288 tokens, so that these say little
about long videos.

{time}
{cannot}## How it was measured

```console
{command}
```

{versions}.
"""


def page(result: Benchmark, picture: str, command: str) -> str:
    """Tables of every score, with ``picture`` beside the page and the ``command`` that made it."""
    plain, *others = result.scores
    able = [score for score in others if score.accuracy is not None]
    ratios = sorted({score.keep_ratio or 1.0 for score in able}, reverse=True)
    best = {
        score.strategy: score.accuracy or 0.0 for score in able if score.keep_ratio == ratios[-1]
    }
    names = sorted({score.strategy for score in able}, key=lambda name: (-best.get(name, 0), name))
    found = {(score.strategy, score.keep_ratio): score for score in able}

    def over_ratios(cell: Callable[[Score], str]) -> str:
        rows = (
            [_name(name), *(_cell(found.get((name, ratio)), cell) for ratio in ratios)]
            for name in names
        )
        return table(["strategy", *(f"keep {ratio:g}" for ratio in ratios)], rows)

    by_task = ""
    for ratio in ratios:
        rows = [("uncompressed", plain)]
        rows += [(_name(name), found[name, ratio]) for name in names if (name, ratio) in found]
        cells = ([name, *(_right(score, task) for task in plain.tasks)] for name, score in rows)
        by_task += f"### keep {ratio:g}\n\n{table(['strategy', *plain.tasks], cells)}\n"
    low, high = interval(result.questions // 2, 2 * (result.questions // 2) or 1)
    own = result.model == OWN_MODEL
    return PAGE.format(
        model="the micro Qwen3-VL that the package ships" if own else result.model,
        questions=result.questions,
        tasks=len(plain.tasks),
        first=HELD_OUT_PATCHES[0],
        last=HELD_OUT_PATCHES[-1],
        controls=", ".join(f"`{name}`" for name in CONTROLS),
        picture=picture,
        total=plain.total.questions,
        plain=_accuracy(plain),
        overall=over_ratios(_accuracy),
        kept=_departures(able),
        hints=_hints(able),
        agreement=over_ratios(lambda score: f"{score.agreement:.0%} ({score.kl:.3f})"),
        margin=50 * (high - low),
        by_task=by_task.rstrip("\n") + "\n",
        device=result.device,
        dtype=result.dtype,
        time=over_ratios(lambda score: f"{score.plan_ms:.2f}"),
        cannot=_cannot(others),
        command=shell(command),
        versions=", ".join(f"{name} {number}" for name, number in result.versions.items()),
    )


def _accuracy(score: Score) -> str:
    total = score.total
    low, high = interval(total.right, total.questions)
    return f"{score.accuracy:.1%} ({100 * low:.0f}–{100 * high:.0f})"


def _right(score: Score, task: str) -> str:
    counts = next((value for name, value in score.tasks.items() if name == task), None)
    return NONE if counts is None else f"{100 * counts.right / counts.questions:.0f}"


def _departures(able: Sequence[Score]) -> str:
    """Who kept another share than was asked for; rounding up to whole tokens is none."""
    far = [
        f"`{score.strategy}` {score.kept:.3f} of {score.keep_ratio:g}"
        for score in able
        if abs((score.kept or 0) - (score.keep_ratio or 0)) > 0.005
    ]
    if far:
        return f"Kept another share than asked for: {', '.join(far)}.\n"
    return "All kept the share that was asked for, to a token per clip.\n"


def _hints(able: Sequence[Score]) -> str:
    """What the strategies themselves say of such budgets, for the shortest clips."""
    registry, lines = default_registry(), []
    for score in able:
        if score.strategy in registry.strategies and score.options is not None:
            strategy = get_configuration(score.options, registry=registry).strategy
            if hint := strategy.hint((HELD_OUT_PATCHES[0], 1, TOKENS_PER_FRAME)):
                lines.append(f"- `{score.strategy}` at {score.keep_ratio:g}: {hint}.\n")
    return f"\nIn clips of {HELD_OUT_PATCHES[0]} patches:\n\n{''.join(lines)}" if lines else ""


def _cannot(others: Sequence[Score]) -> str:
    reasons = {score.strategy: score.reason for score in others if score.reason}
    rows = "".join(f"- `{name}`: {reason}\n" for name, reason in reasons.items())
    return f"## What cannot run\n\n{rows}\n" if rows else ""


def _name(name: str) -> str:
    return f"`{name}` (control)" if name in CONTROLS else f"`{name}`"


def _cell(score: Score | None, text: Callable[[Score], str]) -> str:
    return NONE if score is None else text(score)
