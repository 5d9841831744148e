"""The notebook runs from top to bottom, on a CPU, and prints what it shows."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/first_steps.ipynb"

pytestmark = pytest.mark.usefixtures("one_thread")


def without_times(text):
    return re.sub(r"[\d.]+ ms", "# ms", text).split()


def test_every_cell_runs_and_prints_what_it_shows(capsys):
    held = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (held["nbformat"], held["nbformat_minor"]) == (4, 5)
    names = {"__name__": "notebook"}
    for cell in held["cells"]:
        if cell["cell_type"] != "code":
            continue
        capsys.readouterr()
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        shown = "".join("".join(output["text"]) for output in cell["outputs"])
        assert without_times(capsys.readouterr().out) == without_times(shown)
    assert "<svg" in names["tokens"]._repr_html_()
