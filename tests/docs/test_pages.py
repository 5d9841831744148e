"""The Python of each page runs as it stands, top to bottom, and prints what the page says."""

from __future__ import annotations

import re
import textwrap
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# Its script asks 100 questions under each of 14 settings.
TOO_LONG = {ROOT / "docs/explanation/micro.md"}
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
PROGRAM = "session.detach()  # the model is as it was"


def blocks(path):
    """The Python of a page, block by block, and what stands below each as its output, or None."""
    text = path.read_text("utf-8")
    found = list(BLOCK.finditer(text))
    for block, after in zip_longest(found, found[1:]):
        if block[2] == "python":
            adjoins = after is not None and text[block.end() : after.start()].strip() == ""
            shown = after[3] if adjoins and after[2] == "text" else None
            yield textwrap.dedent(block[3]), shown and textwrap.dedent(shown)


def without_figures(text):
    """The words of an output: times differ from run to run, and sums from machine to machine."""
    return re.sub(r"[\d.]+", "#", text).split()


WITH_PYTHON = [path for path in PAGES if list(blocks(path))]


@pytest.mark.parametrize(
    "path",
    [path for path in WITH_PYTHON if path not in TOO_LONG],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_python_in_the_pages_runs(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    names = {"__name__": path.stem}
    capsys.readouterr()
    for code, shown in blocks(path):
        exec(compile(code, str(path), "exec"), names)
        printed = capsys.readouterr().out
        if shown is not None:
            assert without_figures(printed) == without_figures(shown)


def test_pages_that_show_the_whole_program_show_the_same():
    programs = [code for path in WITH_PYTHON for code, _ in blocks(path) if PROGRAM in code]
    assert len(programs) == 3
    assert len(set(programs)) == 1
