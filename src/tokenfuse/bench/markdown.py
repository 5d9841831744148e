"""Tables of the generated pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

NONE = "–"
"""Stands in a cell that has no value."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table, a line per row, with a newline at its end.

    The first ``left`` columns are aligned to the left, the others, of numbers, to the right. White
    space in a cell becomes one space, and ``|`` is escaped.
    """
    marks = ["---"] * left + ["---:"] * (len(columns) - left)
    lines = [columns, marks, *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


WIDEST = 84
"""Columns of a command that a page shows without cutting it."""


def shell(command: str) -> str:
    """A command as a shell takes it, over as many lines as it needs."""
    parts: list[str] = []
    for word in shlex.split(command):
        # An option and its value stay together.
        if parts and parts[-1].startswith("--") and " " not in parts[-1] and word[:1] != "-":
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    lines = ["$"]
    for word in parts:
        if len(lines[-1]) + len(word) > WIDEST - 3 and lines[-1] != "$":
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
