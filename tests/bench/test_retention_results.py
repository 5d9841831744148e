"""The committed results of the retention benchmark: no cheating, and reproducible."""

from __future__ import annotations

from math import comb
from pathlib import Path

import pytest

from tokenfuse.bench.retention.ask import ask, fingerprint
from tokenfuse.bench.retention.plan import BLIND, UNCOMPRESSED, UNDECIDED, read_plan, settings
from tokenfuse.bench.retention.records import Records
from tokenfuse.bench.retention.summary import COUNTED, Summary, chance
from tokenfuse.inference.load import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.micro.questions import PLAIN, SUBTLE
from tokenfuse.registry import default_registry

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PLANS = {name: read_plan(ROOT / "benchmarks" / f"{name}.yaml") for name in ("retention", "strata")}


def records(folder, model):
    return Records(RESULTS / folder / f"{model}.jsonl")


@pytest.fixture(scope="module", params=PLANS)
def folder(request):
    return request.param


@pytest.fixture(scope="module", params=sorted(INSTRUMENTS))
def model(request):
    return request.param


@pytest.fixture(scope="module")
def held(folder, model):
    return records(folder, model)


def right(held, task, setting):
    answers = [x for bits in held.right(task, setting).values() for x in bits]
    return int(sum(answers)), len(answers)


def luck(successes, trials, share):
    """How likely so many right guesses or more are."""
    return sum(
        comb(trials, k) * share**k * (1 - share) ** (trials - k)
        for k in range(successes, trials + 1)
    )


def test_the_results_are_of_the_shipped_models_and_complete(folder, held):
    plan = PLANS[folder]
    assert held.header.sha256 == fingerprint(load(INSTRUMENTS[held.header.model])[0])
    assert (held.header.questions, held.header.patches) == (plan.questions, plan.patches)
    assert set(held.clips) == {*PLAIN, *SUBTLE}
    chosen = settings(plan, default_registry())
    assert all(held.done(task, s.key) for task in plan.tasks for s in chosen)


def test_no_task_can_be_answered_without_video(held):
    for task in (*PLAIN, *SUBTLE):
        count, asked = right(held, task, BLIND)
        assert held.answers[task, BLIND].tokens.keys() == held.clips[task].displacement.keys()
        assert sum(held.answers[task, BLIND].tokens.values()) == 0
        assert luck(count, asked, chance(task)) > 0.001, f"{task}: {count} of {asked}"


def test_no_subtle_task_can_be_answered_without_its_decisive_patches(held):
    for task in SUBTLE:
        count, asked = right(held, task, UNDECIDED)
        assert luck(count, asked, chance(task)) > 0.001, f"{task}: {count} of {asked}"


def test_subtle_tasks_count(held):
    summary = Summary(held)
    assert set(SUBTLE) <= set(summary.counted)
    for task in summary.counted:
        count, asked = right(held, task, UNCOMPRESSED)
        assert count / asked >= COUNTED


def test_two_runs_gave_equal_answers_to_the_questions_that_both_asked(model):
    """The plans share their first seeds and some settings, and were run by themselves."""
    few, many = records("retention", model), records("strata", model)
    keys = [s.key for s in settings(PLANS["strata"], default_registry()) if few.done("gap", s.key)]
    assert len(keys) == 6
    differ = asked = 0
    for task in (*PLAIN, *SUBTLE):
        for key in (UNCOMPRESSED, BLIND, *keys):
            more = many.right(task, key)
            for motion, answers in few.right(task, key).items():
                asked += len(answers)
                differ += int((answers != more[motion][: len(answers)]).sum())
    assert asked == 8000
    # In a batch of another size a logit may be rounded the other way.
    assert differ <= 7


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("plain", "vanish"),
        ("robust", "count"),
        pytest.param("plain", "count", marks=pytest.mark.full),
        pytest.param("robust", "vanish", marks=pytest.mark.full),
    ],
)
def test_a_slice_asked_again_gives_the_committed_answers(model, task, tmp_path):
    held = records("retention", model)
    plan = PLANS["retention"].model_copy(update={"tasks": [task]})
    sweeps = {"published", "attention-causal"}
    chosen = [s for s in settings(plan, default_registry()) if sweeps & s.where.keys()]
    assert [s.configuration.attention for s in chosen] == ["plain", "plain", "proportional"]
    again = Records(tmp_path / f"{model}.jsonl")
    ask(model, INSTRUMENTS[model], plan, chosen, again, lambda *_: None)
    assert again.clips[task] == held.clips[task]
    checks = [UNDECIDED] if task in SUBTLE else []
    for key in (UNCOMPRESSED, BLIND, *checks, *(s.key for s in chosen)):
        ours, theirs = again.answers[task, key], held.answers[task, key]
        assert sum(ours.tokens.values()) == pytest.approx(sum(theirs.tokens.values()), rel=0.01)
        pairs = zip("".join(ours.right.values()), "".join(theirs.right.values()), strict=True)
        # Another processor may round a logit the other way.
        assert sum(a != b for a, b in pairs) <= 1, key
