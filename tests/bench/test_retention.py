"""``tokenfuse bench retention``: plans, records that survive a kill, statistics, page, controls."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from tokenfuse.bench.retention.ask import lacking
from tokenfuse.bench.retention.plan import BLIND, UNCOMPRESSED, UNDECIDED, Plan, read_plan, settings
from tokenfuse.bench.retention.records import Answers, Clips, Header, Records
from tokenfuse.bench.retention.run import costs, retention
from tokenfuse.bench.retention.summary import Summary, in_group, in_stratum
from tokenfuse.cli import app
from tokenfuse.errors import ConfigError
from tokenfuse.inference.json_lines import alone
from tokenfuse.inference.load import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.registry import default_registry

pytestmark = pytest.mark.usefixtures("one_thread")

HEADER = Header(
    model="plain", sha256="0", questions=4, patches=8, seed=0, device="cpu", dtype="float32",
    versions={},
)  # fmt: skip
SMALL = {
    "questions": 2,
    "tasks": ["color", "vanish"],
    "motions": ["still", "pan_fast"],
    "sweeps": [
        {"name": "published", "strategy": "ttf-published"},
        {"name": "ratios", "strategy": "ttf", "grid": {"keep_ratio": [0.5, 0.25]}},
    ],
    "focus": ["published"],
}


def small_plan():
    return Plan.model_validate(SMALL)


def run_small(out, plan=None):
    return retention(
        plan or small_plan(),
        INSTRUMENTS,
        out,
        ask_only=["plain"],
        command="it",
        err=Console(quiet=True),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run_small(out)
    return out


# Plans


def test_equal_settings_of_two_sweeps_are_asked_once():
    plan = Plan.model_validate(
        {
            "sweeps": [
                {"name": "a", "strategy": "ttf", "grid": {"threshold": [0.7, 0.8]}},
                {"name": "b", "strategy": {"strategy": "ttf", "threshold": 0.8}},
            ]
        }
    )
    found = settings(plan, default_registry())
    assert len(found) == 2
    both = next(s for s in found if len(s.where) == 2)
    assert both.where["a"]["threshold"] == 0.8


def test_all_stands_for_every_strategy_that_takes_a_ratio():
    plan = Plan.model_validate(
        {"sweeps": [{"name": "s", "strategy": "all", "grid": {"keep_ratio": [0.5, 0.3]}}]}
    )
    found = settings(plan, default_registry())
    names = {s.configuration.strategy.name for s in found}
    assert {"ttf", "tome", "attention", "uniform"} <= names
    assert len(found) == 2 * len(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": 0}, r"line \d+: questions: 0 is wrong: it should be greater"),
        ({"tasks": ["smell"]}, r"line \d+: tasks\.0: 'smell' is wrong: it should be"),
        ({"sweep": []}, r"line \d+: unknown key sweep: did you mean \"sweeps\""),
        (
            {"sweeps": [{"name": "a", "strategi": "ttf"}]},
            r"line \d+: sweeps\.0\.strategy is missing",
        ),
        ({"sweeps": [{"name": "a", "strategy": "tft"}]}, "ttf"),
        ({"sweeps": [{"name": "a", "strategy": "ttf", "grid": {"window": [2]}}]}, "odd"),
        ({"focus": ["ratios"]}, "ratios is no sweep with one setting"),
        ({"sweeps": [{"name": "a", "strategy": "ttf"}] * 2}, "a: two have this name"),
    ],
)
def test_a_faulty_plan_is_refused_by_the_key(tmp_path, change, message):
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(SMALL | change))
    with pytest.raises(ConfigError, match=message):
        settings(read_plan(path), default_registry())


def test_no_two_strata_of_a_task_share_a_seed():
    plan = Plan.model_validate({"questions": 1000})
    seeds = [seed for stratum in plan.strata("color") for seed in plan.seeds(stratum)]
    assert len(seeds) == len(set(seeds)) == 8000


# Records


def answers(setting, bits, left, task="color"):
    return Answers(task=task, setting=setting, right=bits, tokens=left)


def test_what_was_appended_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    records = Records(path)
    records.begin(HEADER)
    records.append(answers("x", {"still": "1101"}, {"still": 9}))
    again = Records(path)
    assert again.header == HEADER
    assert again.right("color", "x")["still"].tolist() == [True, True, False, True]
    assert not again.done("color", "y")


def test_a_line_cut_short_is_removed_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    records = Records(path)
    records.begin(HEADER)
    records.append(answers("x", {"still": "1"}, {"still": 9}))
    with path.open("a") as file:
        file.write('{"task":"color","setting":"y","rig')
    torn = path.read_bytes()
    again = Records(path)
    assert not again.done("color", "y")
    assert path.read_bytes() == torn, "another process may be about to end the line"
    again.append(answers("y", {"still": "0"}, {"still": 9}))
    assert [json.loads(line).get("setting") for line in path.read_text().splitlines()] == [
        None,
        "x",
        "y",
    ]


def test_no_question_counts_twice(tmp_path):
    path = tmp_path / "a.jsonl"
    records = Records(path)
    records.begin(HEADER)
    records.append(answers("x", {"still": "10"}, {"still": 9}))
    records.append(answers("x", {"still": "11"}, {"still": 9}))
    assert Records(path).right("color", "x")["still"].tolist() == [True, False]


def test_two_runs_do_not_write_one_file(tmp_path):
    with (
        alone(tmp_path / "plain.jsonl"),
        pytest.raises(ConfigError, match=r"another run is adding to .*plain\.jsonl: wait"),
    ):
        run_small(tmp_path)
    assert not (tmp_path / "plain.jsonl").exists()
    with alone(tmp_path / "plain.jsonl"), alone(tmp_path / "robust.jsonl"):
        pass
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "plain.jsonl")
    with (
        alone(tmp_path / "plain.jsonl"),
        pytest.raises(ConfigError, match="another run"),
        alone(tmp_path / "link.jsonl"),
    ):
        pass


@pytest.mark.parametrize("text", ["{}\n", "no json\n", '{"task": 1}\n', "[]\n", '{"a": 1}\n'])
def test_another_file_is_not_mistaken_for_records(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no record of this command"):
        Records(path)
    assert path.read_text() == text


def test_answers_of_another_model_or_plan_are_not_mixed(tmp_path):
    records = Records(tmp_path / "a.jsonl")
    records.begin(HEADER)
    with pytest.raises(ConfigError, match="holds answers for sha256 0; this run has 1"):
        Records(tmp_path / "a.jsonl").begin(HEADER.model_copy(update={"sha256": "1"}))


# Statistics


@pytest.fixture
def by_hand(tmp_path):
    """Two counted tasks and one that the model cannot do, under two motions."""
    records = Records(tmp_path / "hand.jsonl")
    records.begin(HEADER)
    for task in ("color", "shape", "hue"):
        moved = {"still": [0.0, 0.0], "pan_fast": [1.2, 0.8]}
        records.append(Clips(task=task, displacement=moved))
        plain = {"still": "11", "pan_fast": "11" if task != "hue" else "00"}
        records.append(answers(UNCOMPRESSED, plain, {"still": 80, "pan_fast": 120}, task))
    for task, still, fast in (("color", "11", "01"), ("shape", "10", "11"), ("hue", "11", "11")):
        left = {"still": 20, "pan_fast": 60}
        records.append(answers("x", {"still": still, "pan_fast": fast}, left, task))
    return Summary(records)


def test_costs_are_paired_and_over_counted_tasks(by_hand):
    assert by_hand.counted == ["color", "shape"]
    cost = by_hand.cost("x")
    assert (cost.questions, cost.before, cost.after) == (8, 1.0, 0.75)
    assert cost.retention.value == 0.75
    assert cost.p == 2 / 4  # two answers lost, none won
    assert cost.removed == pytest.approx(1 - 160 / 400)


def test_costs_by_motion_group_go_by_the_measured_motion(by_hand):
    high, medium = (by_hand.cost("x", in_group(by_hand, g)) for g in ("high", "medium"))
    assert (high.questions, high.after) == (2, 0.5)  # of color and shape, displacement 1.2
    assert (medium.questions, medium.after) == (2, 1.0)
    assert high.removed == 0.5


def test_costs_of_a_stratum_count_even_where_the_task_does_not(by_hand):
    cost = by_hand.cost("x", in_stratum("hue", "still"))
    assert (cost.questions, cost.retention.value, cost.removed) == (2, 1.0, 0.75)
    assert np.isnan(by_hand.cost("x", in_stratum("hue", "pan_fast")).retention.value)
    assert by_hand.cost("y") is None


# Runs


def test_answers_under_other_motions_are_not_mixed(whole, tmp_path):
    (tmp_path / "plain.jsonl").write_bytes((whole / "plain.jsonl").read_bytes())
    plan = Plan.model_validate(SMALL | {"motions": ["still", "pan_fast", "cut"]})
    with pytest.raises(
        ConfigError, match="to color under still, pan_fast; this run has still, pan"
    ):
        run_small(tmp_path, plan)


def test_a_task_that_makes_no_sense_is_named_and_a_plan_of_such_is_refused(tmp_path):
    small = {"questions": 1, "motions": ["still"], "sweeps": []}
    run_small(tmp_path, Plan.model_validate(small | {"tasks": ["color", "end"]}))
    assert "Not asked, because they make no sense" in (tmp_path / "index.md").read_text()
    assert "in 8 patches: end.\n" in (tmp_path / "index.md").read_text()
    with pytest.raises(ConfigError, match="no task of end makes sense under still"):
        run_small(tmp_path, Plan.model_validate(small | {"tasks": ["end"]}))


def test_a_run_asks_everything_once(whole):
    records, plan = Records(whole / "plain.jsonl"), small_plan()
    chosen = settings(plan, default_registry())
    assert all(not list(lacking(plan, chosen, records, task)) for task in plan.tasks)
    keys = {UNCOMPRESSED, BLIND, *(s.key for s in chosen)}
    assert set(records.answers) == {
        *(("color", key) for key in keys),
        *(("vanish", key) for key in (*keys, UNDECIDED)),
    }
    assert all(
        {motion: len(bits) for motion, bits in given.right.items()} == {"still": 2, "pan_fast": 2}
        for given in records.answers.values()
    )
    half = next(s.key for s in chosen if s.configuration.strategy.keep_ratio == 0.5)
    tokens = {key: records.answers["vanish", key].tokens for key in (UNCOMPRESSED, BLIND, half)}
    assert tokens[UNCOMPRESSED] == {"still": 576, "pan_fast": 576}
    assert tokens[half] == {"still": 288, "pan_fast": 288}
    assert tokens[BLIND] == {"still": 0, "pan_fast": 0}
    # One temporal patch of each clip.
    assert records.answers["vanish", UNDECIDED].tokens == {"still": 504, "pan_fast": 504}


KILLED = f"""
import os, signal
from {Records.__module__} import Records
from tokenfuse.cli import app

append = Records.append

def killed(self, line):
    if len(self.answers) < 3:
        return append(self, line)
    with self.path.open("ab") as file:
        file.write(line.model_dump_json().encode()[:9])
    os.kill(os.getpid(), signal.SIGKILL)

Records.append = killed
app()
"""
"""The command line, which is killed while it writes its fourth answer."""


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(tmp_path, whole):
    config, out = tmp_path / "bench.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-c", KILLED, "bench", "retention", "--config", str(config)]
    command += ["--out", str(out), "--model", "plain", "--threads", "1"]
    held = out / "plain.jsonl"
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert run.returncode == -signal.SIGKILL
    killed = held.read_bytes()
    assert killed.count(b'"right"') == 3
    assert not killed.endswith(b"\n")
    run_small(out)
    assert held.read_bytes().startswith(killed[: killed.rfind(b"\n") + 1])
    assert held.read_bytes() == (whole / "plain.jsonl").read_bytes()
    assert (out / "index.md").read_bytes() == (whole / "index.md").read_bytes()


def test_a_finished_run_only_gains_what_is_new(tmp_path, whole, monkeypatch):
    (tmp_path / "plain.jsonl").write_bytes((whole / "plain.jsonl").read_bytes())
    more = SMALL | {
        "sweeps": [
            *SMALL["sweeps"],
            {"name": "uniform", "strategy": "uniform", "grid": {"keep_ratio": [0.5]}},
        ]
    }
    run_small(tmp_path, Plan.model_validate(more))
    before, after = (Records(folder / "plain.jsonl") for folder in (whole, tmp_path))
    assert after.path.read_bytes().startswith(before.path.read_bytes())
    assert len(after.answers) == len(before.answers) + 2


def test_the_page_has_a_table_of_every_sweep_and_its_pictures(whole):
    text = (whole / "index.md").read_text()
    for heading in ("## Without compression", "## published", "## ratios", "by stratum: plain"):
        assert heading in text
    assert "keep_ratio 0.25 | plain | 75.0 |" in text
    assert {p.name for p in whole.glob("*.png")} == {
        part.split(")")[0] for part in text.split("](")[1:] if ".png" in part
    }


def test_a_model_that_is_none_is_refused(tmp_path):
    result = CliRunner().invoke(
        app, ["bench", "retention", "--out", str(tmp_path), "--model", "large"]
    )
    assert result.exit_code == 2
    assert "--model large is none of plain, robust" in result.stderr


def test_the_instruments_are_small_and_see_alike():
    models = {name: load(folder)[0] for name, folder in INSTRUMENTS.items()}
    for folder in INSTRUMENTS.values():
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 4e6
    towers = [dict(model.model.visual.state_dict()) for model in models.values()]
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])
    readers = [model.model.language_model.layers[0].mlp.up_proj.weight for model in models.values()]
    assert not torch.equal(*readers)


def test_costs_are_those_of_the_page(whole):
    found = costs(small_plan(), INSTRUMENTS, whole)
    assert {row["model"] for row in found} == {"plain"}
    assert len(found) == len(settings(small_plan(), default_registry()))
    for row in found:
        assert row["retention"]["low"] <= row["retention"]["value"] <= row["retention"]["high"]
        assert 0 < row["removed"] < 1
    json.dumps(found)
