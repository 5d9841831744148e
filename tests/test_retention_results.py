"""The committed results of the retention benchmark: no cheating, and reproducible."""

from __future__ import annotations

from math import comb
from pathlib import Path

import pytest

from tokenfuse.bench.retention.ask import ask, fingerprint
from tokenfuse.bench.retention.plan import BLIND, UNCOMPRESSED, UNDECIDED, read_plan, settings
from tokenfuse.bench.retention.records import Records
from tokenfuse.bench.retention.summary import COUNTED, Summary, chance
from tokenfuse.inference import load
from tokenfuse.micro import INSTRUMENTS
from tokenfuse.micro.questions import PLAIN, SUBTLE
from tokenfuse.registry import registry

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "results" / "retention"
PLAN = read_plan(ROOT / "benchmarks" / "retention.yaml")


@pytest.fixture(scope="module", params=sorted(INSTRUMENTS))
def held(request):
    return Records(FOLDER / f"{request.param}.jsonl")


def right(records, task, setting):
    answers = [x for bits in records.right(task, setting).values() for x in bits]
    return int(sum(answers)), len(answers)


def luck(successes, trials, share):
    """How likely so many right guesses or more are."""
    return sum(
        comb(trials, k) * share**k * (1 - share) ** (trials - k)
        for k in range(successes, trials + 1)
    )


def test_the_results_are_of_the_shipped_models_and_complete(held):
    model, _ = load(INSTRUMENTS[held.header.model])
    assert held.header.sha256 == fingerprint(model)
    assert (held.header.questions, held.header.patches) == (PLAN.questions, PLAN.patches)
    assert set(held.clips) == {*PLAIN, *SUBTLE}
    chosen = settings(PLAN, registry())
    assert all(held.done(task, s.key) for task in PLAN.tasks for s in chosen)


def test_no_task_can_be_answered_without_video(held):
    for task in PLAN.tasks:
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


def test_a_slice_asked_again_gives_the_committed_answers(held, tmp_path):
    name = held.header.model
    plan = PLAN.model_copy(update={"tasks": ["vanish"]})
    chosen = [s for s in settings(plan, registry()) if {"published", "causal"} & s.where.keys()]
    assert len(chosen) == 2
    again = Records(tmp_path / f"{name}.jsonl")
    ask(name, INSTRUMENTS[name], plan, chosen, again, lambda *_: None)
    assert again.clips["vanish"] == held.clips["vanish"]
    for key in (UNCOMPRESSED, BLIND, UNDECIDED, *(s.key for s in chosen)):
        ours, theirs = again.answers["vanish", key], held.answers["vanish", key]
        assert sum(ours.tokens.values()) == pytest.approx(sum(theirs.tokens.values()), rel=0.01)
        pairs = zip("".join(ours.right.values()), "".join(theirs.right.values()), strict=True)
        # Another processor may round a logit the other way.
        assert sum(a != b for a, b in pairs) <= 1, key
