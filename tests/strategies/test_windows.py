"""Whole tokens for groups whose sizes the host knows."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.strategies._windows import share_out


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.integers(0, 1000))
def test_remainders_are_exact_and_the_earliest_wins_on_ties(weights, total):
    shares = [Fraction(total * w, sum(weights)) for w in weights]
    whole = [int(share) for share in shares]
    order = sorted(range(len(weights)), key=lambda i: whole[i] - shares[i])
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    assert share_out(total, weights, total) == whole


def test_shares_that_floating_point_cannot_hold_tie():
    # A half and two and a half.
    assert share_out(3, [1, 5], 3) == [1, 2]


def test_weights_of_zero_are_all_the_same_and_none_share_nothing():
    assert share_out(5, [0, 0], 5) == [3, 2]
    assert share_out(5, [], 5) == []
