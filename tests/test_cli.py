"""The command line: what it prints where, and what it says before it loads a model."""

from __future__ import annotations

import io
import json
import platform
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

import tokenfuse
from tokenfuse.bench import micro, tables
from tokenfuse.bench.micro import Benchmark, Score, TaskScore
from tokenfuse.cli import app
from tokenfuse.inference import run as inference_run
from tokenfuse.micro import CHECKPOINT, NOTE, SAMPLE, SAMPLE_QUESTION
from tokenfuse.micro.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")

cli = CliRunner()


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def test_the_version_is_printed_by_both_names_of_the_command():
    assert cli.invoke(app, ["--version"]).stdout == f"tokenfuse {tokenfuse.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "tokenfuse", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"tokenfuse {tokenfuse.__version__}\n"
    assert "Usage: tokenfuse " in cli.invoke(app, ["--help"], prog_name="tokenfuse").stdout


def test_completion_can_be_installed():
    assert "--install-completion" in cli.invoke(app, ["--help"]).stdout


def test_env_prints_what_a_report_needs():
    found = json.loads(cli.invoke(app, ["env", "--json"]).stdout)
    assert found["tokenfuse"] == tokenfuse.__version__
    assert found["python"] == platform.python_version()
    assert {"torch", "transformers", "platform", "device", "plugins"} <= found.keys()
    assert f"transformers  {found['transformers']}" in cli.invoke(app, ["env"]).stdout


# The micro model and a video of the caller's own


def test_the_micro_model_says_that_it_does_not_know_the_callers_video(tmp_path):
    options = ["--repeats", "1", "--frames", "4", "--json"]
    clip = tmp_path / "holiday.mp4"
    clip.write_bytes(SAMPLE.read_bytes())
    for command in (["run", str(clip)], ["compare", str(clip), "--strategies", "uniform"]):
        for model in ([], ["--model", str(CHECKPOINT)]):
            result = cli.invoke(app, [*command, *model, *options])
            assert json.loads(result.stdout)["note"] == NOTE
            assert f"note: {NOTE}\n" in result.stderr


def test_its_own_clip_needs_no_note():
    options = ["--repeats", "1", "--frames", "4", "--json"]
    for clip in ([], [str(SAMPLE)]):
        result = cli.invoke(app, ["run", *clip, *options])
        assert json.loads(result.stdout)["note"] is None
        assert json.loads(result.stdout)["question"] == SAMPLE_QUESTION
        assert "note" not in result.stderr


# Tables


def test_a_list_is_whole_off_a_terminal_and_wraps_on_one():
    rows = [{"name": "x", "about": "one two three " * 20}]
    wide = Console(file=io.StringIO(), width=40)
    tables.print_list(wide, rows)
    assert rows[0]["about"].strip() in wide.file.getvalue()
    narrow = terminal(40)
    tables.print_list(narrow, rows)
    words = narrow.file.getvalue().split()
    assert words[2:] == ["x", *rows[0]["about"].split()]
    for command in ("strategies", "adapters"):
        listed = json.loads(cli.invoke(app, [command, "--json"]).stdout)
        table = cli.invoke(app, [command]).stdout
        assert all(row["about"] in table for row in listed)


def test_no_head_of_a_table_is_cut_on_a_narrow_terminal():
    scores = {task: TaskScore(questions=200, right=200) for task in TASKS}
    result = Benchmark(
        model="tokenfuse.micro",
        questions=200,
        device="cpu",
        dtype="float32",
        versions={},
        scores=[Score(strategy="uncompressed", tasks=scores)],
    )
    out = terminal(70)
    tables.print_benchmark(out, result)
    assert "…" not in out.file.getvalue()
    assert "uncompressed" in out.file.getvalue()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ttf", ""),
        ({"strategy": "ttf", "keep_ratio": 0.25, "window": 5}, " {keep_ratio: 0.25, window: 5}"),
        (
            {"compose": ["ttf", {"strategy": "attention", "keep_ratio": 0.4}]},
            " {compose: [ttf, {strategy: attention, keep_ratio: 0.4}]}",
        ),
        ({"video": "ttf-third"}, " {video: {strategy: ttf, keep_ratio: 0.33}}"),
    ],
)
def test_only_options_that_are_not_the_defaults_are_printed(source, expected):
    assert tables._options(tokenfuse.get_strategy(source).describe()) == expected


def test_the_report_of_a_run_shows_what_was_set():
    result = cli.invoke(app, ["run", "--set", "threshold=0.8", "--repeats", "1", "--no-compare"])
    assert "\nttf {threshold: 0.8}\n" in result.stdout


# What is wrong is said first


def no_model(*_):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--keep-ratio", "33"], "for 33 per cent write 0.33"),
        (["compare", "--keep-ratio", "12.5%"], "for 12.5 per cent write 0.125"),
        (
            ["compare", "--keep-ratio", "0"],
            "--keep-ratio 0 is no share of tokens; expected (0, 1]\n",
        ),
        (["run", "--set", "keep_ratio=33"], "for 33 per cent write 0.33"),
        (["run", "--set", "keep_ratio=33%"], "for 33 per cent write 0.33"),
        (["run", "https://example.com/a.mp4"], "https://example.com/a.mp4 is a URL"),
    ],
)
def test_shares_and_urls_are_explained_before_a_model_is_loaded(arguments, message, monkeypatch):
    for module in (inference_run, micro):
        monkeypatch.setattr(module, "load", no_model)
    result = cli.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_shares_and_pictures_are_checked_before_transformers_is_imported(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib.backend_bases'] = None\n"
        "from tokenfuse.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "except SystemExit as done:\n"
        "    print(done.code, 'transformers' in sys.modules)\n"
    )
    for options in (["--keep-ratio", "33"], ["--plot", str(tmp_path / "x.png")]):
        done = subprocess.run(
            [sys.executable, "-c", code, "compare", *options], capture_output=True, text=True
        )
        assert done.stdout == "2 False\n", done.stderr
