"""What ``tokenfuse bench speed`` measured, as a page and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module  # matplotlib by name: type checkers run without it
from pathlib import Path
from typing import Any

from tokenfuse.bench.markdown import NONE, shell, table
from tokenfuse.bench.speed.matching import Matching, MatchingRow
from tokenfuse.bench.speed.run import Speed, SpeedRow
from tokenfuse.costs import size
from tokenfuse.errors import ConfigError

HEAD = [
    "strategy",
    "kept",
    "tower",
    "compression",
    "prefill",
    "first token",
    "faster",
    "LLM faster",
    "of ideal",
    "per token",
    "peak",
    "cache",
]
MATCHING_HEAD = [
    "strategy",
    "kept",
    "frames",
    "grid",
    "width",
    "dtype",
    "kernel",
    "plan",
    "reads",
    "fuse",
    "fuse reads",
    "one read",
]
PARTS = {"vision_ms": "#b8b8b8", "compress_ms": "#d55e00", "prefill_ms": "#0072b2"}


def about(result: Speed) -> str:
    """The model, the prompt and the machine in a sentence each."""
    frames, height, width = result.grid
    weights = "random weights" if result.random_weights else "its own weights"
    batch = f", batch {result.batch}" if result.batch > 1 else ""
    return (
        f"{result.model} with {weights}, {result.layers} decoder layers of {result.hidden} and "
        f"{result.vision_blocks} vision blocks of {result.vision_hidden}; {frames} frames of "
        f"{height} × {width} visual tokens, {result.prompt_tokens} tokens in all{batch}; "
        f"{result.dtype} on {result.device}, {result.threads} threads."
    )


def cells(row: SpeedRow) -> list[str]:
    """One row of the table, in the order of HEAD."""
    kept = "" if row.keep_ratio is None else f"{row.keep_ratio:.0%}"
    if row.ttft_ms is None:
        return [row.strategy, kept, row.reason or NONE, *[NONE] * (len(HEAD) - 3)]
    plain = row.keep_ratio is None
    return [
        row.strategy,
        kept,
        _ms(row.vision_ms),
        NONE if plain else _ms(row.compress_ms),
        _ms(row.prefill_ms),
        _ms(row.ttft_ms),
        _times(row.ttft_speedup),
        _times(row.llm_speedup),
        NONE if plain or row.of_ideal is None else f"{row.of_ideal:.0%}",
        _ms(row.decode_ms),
        NONE if row.peak_bytes is None else size(row.peak_bytes),
        NONE if row.kv_bytes is None else size(row.kv_bytes),
    ]


def page(result: Speed, command: str) -> str:
    """The page in Markdown."""
    rows = [cells(row) for row in result.rows]
    return f"""\
# Speed

{about(result)}

{sentence(result)}

{table(HEAD, rows, left=1).strip()}

*First token* is the vision tower, compression (choosing, fusing and shortening the prompt) and the
prefill of what is left; *per token* is each one after it. *Faster* holds the first token against
that without compression, *LLM faster* compression and prefill against the prefill without. *Ideal*
is the ratio of the prefill's multiply-adds, so that *of ideal* says what compression itself, and
all that does not shrink with the prompt, leaves of it. *Peak* is the most memory that tensors of
compression, prefill and two tokens take, beside weights and inputs. Medians of {result.repeats}
runs, which took turns, after one to warm up. *Faster* is the median of the ratios turn by
turn, since a machine's speed drifts: it need not be the ratio of the medians beside it, and may
exceed the ideal.

```console
{shell(command)}
```

{", ".join(f"{name} {version}" for name, version in result.versions.items())}; {result.machine}.
"""


def sentence(result: Speed) -> str:
    """What the first strategy gains, in a sentence."""
    rows = [row for row in result.rows if row.keep_ratio is not None and row.llm_speedup]
    if not rows:
        return "Nothing was compressed."
    first, plain = rows[0], result.rows[0]
    share = (plain.vision_ms or 0) / (plain.ttft_ms or 1)
    return (
        f"`{first.strategy}` at {first.keep_ratio:.0%} of the visual tokens reads the prompt "
        f"{first.llm_speedup:.1f} times as fast behind the vision tower, {first.of_ideal:.0%} of "
        f"what its FLOPs allow, and has the first token {first.ttft_speedup:.1f} times as fast in "
        f"all; the tower is {share:.0%} of the time without compression."
    )


def draw(result: Speed, path: Path) -> None:
    """The time to the first token as stacked bars. Raises ConfigError without matplotlib."""
    try:
        plots: Any = import_module("matplotlib.pyplot")
    except ImportError:
        raise ConfigError(
            'a picture needs matplotlib; expected pip install ".[plots]", or no --out'
        ) from None
    rows = [row for row in result.rows if row.ttft_ms is not None]
    names = [
        row.strategy if row.keep_ratio is None else f"{row.strategy} {row.keep_ratio:.0%}"
        for row in rows
    ]
    figure, axes = plots.subplots(figsize=(8, 1.2 + 0.4 * len(rows)))
    left = [0.0] * len(rows)
    titles = {"vision_ms": "vision tower", "compress_ms": "compression", "prefill_ms": "prefill"}
    for part, color in PARTS.items():
        values = [(getattr(row, part) or 0.0) / 1e3 for row in rows]
        axes.barh(names, values, left=left, color=color, label=titles[part])
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, end in zip(rows, left, strict=True):
        name = names[rows.index(row)]
        axes.text(end, name, f"  {row.ttft_speedup:.2f}×", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds to the first token")
    axes.set_xlim(0, 1.12 * max(left))
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plots.close(figure)


def matching_cells(row: MatchingRow) -> list[str]:
    """One row of the table of matching, in the order of MATCHING_HEAD."""
    frames, height, width = row.grid
    kept = "" if row.keep_ratio is None else f"{row.keep_ratio:.0%}"
    shape = [str(frames), f"{height}×{width}", str(row.width), row.dtype, row.kernel]
    if row.plan_ms is None:
        return [row.strategy, kept, *shape, row.reason or NONE, *[NONE] * 4]
    return [
        row.strategy,
        kept,
        *shape,
        _ms(row.plan_ms),
        f"{row.reads:.1f}",
        _ms(row.fuse_ms),
        f"{row.fuse_reads:.1f}",
        _ms(row.read_ms),
    ]


def matching_page(result: Matching, commands: Sequence[str]) -> str:
    """The page of matching in Markdown."""
    rows = [matching_cells(row) for row in result.rows]
    lines = "\n".join(map(shell, commands))
    shapes = {(row.grid, row.width) for row in result.rows}
    over = ", shape by shape" if len(shapes) > 1 else ""
    over += ", kernel by kernel" if len({row.kernel for row in result.rows}) > 1 else ""
    return f"""\
# Time of matching{over}

How long a whole plan takes, from features to survivors, in units of one full read of the same
features (`features.sum()`), and how long fusing by it takes. {result.device}, threads:
{result.threads}; medians of {result.repeats} runs, which took turns, after one to warm up. Trust
the ratios and not the milliseconds. *Kernel* is which code searches the local window of `ttf`: see
[Performance](../explanation/performance.md).

{table(MATCHING_HEAD, rows, left=1).strip()}

```console
{lines}
```

{", ".join(f"{name} {version}" for name, version in result.versions.items())}; {result.machine}.
"""


def _ms(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"
