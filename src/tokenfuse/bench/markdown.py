"""Tables of the generated pages."""

from __future__ import annotations

import re
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


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
