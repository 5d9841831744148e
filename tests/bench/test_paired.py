"""Paired statistics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.bench.paired import bootstrap, mcnemar, retention
from tokenfuse.errors import ConfigError


def pairs(both, lost, gained, neither):
    """Answers before and after: so many right in both runs, and so on."""
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return np.array(before, dtype=bool), np.array(after, dtype=bool)


def test_retention_is_right_answers_by_right_answers():
    assert retention(*pairs(6, 2, 1, 1)) == 7 / 8
    assert math.isnan(retention(*pairs(0, 0, 3, 1)))


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 32),
        (5, 1, 2 * (1 + 6) / 64),
        (1, 5, 2 * (1 + 6) / 64),
        (3, 3, 1.0),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(lost, gained, p):
    """The pairs that agree, however many, say nothing."""
    for agree in (0, 40):
        assert mcnemar(*pairs(agree, lost, gained, agree)) == pytest.approx(p, rel=1e-12)


def test_the_interval_is_that_of_drawing_questions_one_by_one():
    before, after = pairs(70, 20, 5, 5)
    found = bootstrap(before, after, draws=20_000)
    rng = np.random.default_rng(1)
    drawn = rng.integers(len(before), size=(20_000, len(before)))
    shares = after[drawn].sum(1) / before[drawn].sum(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    assert found.value == 75 / 90
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)
    assert bootstrap(before, after) == bootstrap(before, after)


small = st.integers(0, 30)


@given(small, small, small, small)
def test_bounds_enclose_the_value(both, lost, gained, neither):
    before, after = pairs(both, lost, gained, neither)
    found = bootstrap(before, after, draws=400)
    if both + lost == 0:
        assert math.isnan(found.value)
    elif both + lost >= 10:
        assert found.low <= found.value <= found.high
    assert 0 <= mcnemar(before, after) <= 1
    if lost == gained == 0 and both:
        assert found == (1.0, 1.0, 1.0)


def test_runs_of_other_questions_are_refused():
    with pytest.raises(ConfigError, match="one of each to every question"):
        retention(np.ones(3, bool), np.ones(4, bool))
