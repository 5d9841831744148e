"""The bench of matching, on shapes so small that only its arithmetic and refusals are tested."""

import json

import pytest
from typer.testing import CliRunner

from tokenfuse.bench.speed import sizes
from tokenfuse.bench.speed.matching import Matching, matching
from tokenfuse.bench.speed.page import MATCHING_HEAD, matching_cells, matching_page
from tokenfuse.cli import app
from tokenfuse.errors import ConfigError, TooLargeError

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(names=("ttf", "divprune"), **options):
    values = {"frames": (2, 4), "sides": ((4, 4),), "widths": (8,), "repeats": 2}
    return matching(names, (0.5,), **values | options)


def test_every_shape_and_kernel_has_a_row():
    steps = []
    result = measured(kernels=("tiles", "shifts"), dtypes=("float32", "bfloat16"), say=steps.append)
    found = [(row.strategy, row.kernel, row.grid[0], row.dtype) for row in result.rows]
    assert found == [
        (strategy, kernel, frames, dtype)
        for frames in (2, 4)
        for dtype in ("float32", "bfloat16")
        for strategy, kernel in (("ttf", "tiles"), ("ttf", "shifts"), ("divprune", "auto"))
    ]
    for row in result.rows:
        assert row.plan_range[0] <= row.plan_ms <= row.plan_range[1]
        assert row.reads == row.plan_ms / row.read_ms
        assert row.fuse_reads == row.fuse_ms / row.read_ms
    assert "shape 1 of 4: ttf, 0/2" in steps[0]
    assert "s left" in steps[-1]
    assert Matching.model_validate_json(result.model_dump_json()) == result
    text = matching_page(result, ["tokenfuse bench matching"])
    assert "| `" not in text
    assert text.count("| ttf |") == 8
    assert all(len(matching_cells(row)) == len(MATCHING_HEAD) for row in result.rows)


def test_strategies_that_act_elsewhere_are_left_out():
    assert {row.strategy for row in measured(("ttf", "fastv")).rows} == {"ttf"}
    with pytest.raises(ConfigError, match="fastv choose nothing before the LLM"):
        measured(("fastv",))


def test_every_strategy_can_be_timed():
    rows = measured((), frames=(3,)).rows
    assert {"ttf", "tome", "attention", "cdpruner", "visionzip"} <= {row.strategy for row in rows}
    assert [row.reason for row in rows if row.plan_ms is None] == []


def test_a_row_that_fails_says_why(monkeypatch):
    from tokenfuse.strategies.ttf import TTF

    def fails(self, tokens):
        raise ConfigError("no such thing\nat all")

    monkeypatch.setattr(TTF, "plan", fails)
    row = measured(("ttf",), frames=(2,)).rows[0]
    assert row.reason == "no such thing"
    assert matching_cells(row)[7] == "no such thing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ("int8",)}, "--dtype int8 is none of"),
        ({"kernels": ("fast",)}, "--kernel fast is none of"),
        ({"frames": (0,)}, "--frames is 0"),
        ({"widths": ()}, "--width is empty"),
        ({"repeats": 0}, "--repeats is 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        measured(**options)


def test_what_does_not_fit_is_refused_beforehand(monkeypatch):
    monkeypatch.setattr(sizes, "free_bytes", lambda: 1000)
    with pytest.raises(TooLargeError, match="1 kB are free"):
        measured()


def test_the_command(tmp_path):
    out = tmp_path / "matching"
    words = ["bench", "matching", "--frames", "2,3", "--grid", "4x4,2x3", "--width", "8,16"]
    words += ["--repeats", "1", "--strategies", "ttf,uniform"]
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    held = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert len(held["rows"]) == 2 * 2 * 2 * 2
    assert "# Time of matching" in out.with_suffix(".md").read_text("utf-8")
    assert not out.with_suffix(".png").exists()
    for wrong, said in (("--grid", "rows x columns"), ("--frames", "no whole number")):
        done = CliRunner().invoke(app, [*words, wrong, "x"])
        assert done.exit_code == 2
        assert said in done.output
