"""DyCoke's temporal stage against its definition."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenfuse.strategies.dycoke import DyCoke
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)
REFERENCE = {1: 1, 2: 2, 3: 1}
"""How many frames back each frame of a window looks."""


def video(grid, seed=0, width=8):
    random = torch.Generator().manual_seed(seed)
    return VisualTokens.from_grid(torch.randn(*grid, width, generator=random), grid)


def held(tokens, **options):
    return DyCoke(**options).plan(tokens).frame_counts(tokens.grid).tolist()


def similarities(tokens):
    """Of each later frame, its places from the least similar to the most."""
    t, h, w = tokens.grid
    x = tokens.features.double().view(t, h * w, -1)
    found = {
        f: torch.cosine_similarity(x[f], x[f - REFERENCE[f % 4]], dim=-1).tolist()
        for f in range(t)
        if f % 4
    }
    values = sorted(s for row in found.values() for s in row)
    assume(all(b - a > 1e-4 for a, b in pairwise(values)))
    return found


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), SEEDS, st.integers(1, 20))
def test_windows_keep_a_whole_frame_and_the_least_similar_of_the_rest(t, h, w, seed, twentieths):
    tokens, places = video((t, h, w), seed), h * w
    each = max(1, twentieths * places // 20)
    kept = {f * places + i for f in range(0, t, 4) for i in range(places)}
    for f, row in similarities(tokens).items():
        order = sorted(range(places), key=row.__getitem__)
        kept |= {f * places + i for i in order[:each]}
    config = DyCoke(frame_keep_ratio=twentieths / 20)
    assert config.num_kept((t, h, w)) == len(kept)
    assert config.plan(tokens).survivors.tolist() == sorted(kept)


@pytest.mark.parametrize("t", range(1, 14))
def test_a_window_keeps_one_frame_and_three_shares_and_no_frame_is_lost(t):
    shares = [10 if f % 4 == 0 else 3 for f in range(t)]
    assert held(video((t, 2, 5))) == shares
    assert DyCoke().num_kept((t, 2, 5)) == sum(shares)


@pytest.mark.parametrize(
    ("ratio", "places", "each"), [(0.3, 196, 58), (0.3, 10, 3), (0.7, 10, 7), (0.3, 3, 1)]
)
def test_a_frame_keeps_the_whole_part_of_its_share_and_at_least_one(ratio, places, each):
    assert DyCoke(frame_keep_ratio=ratio).num_kept((4, 1, places)) == places + 3 * each


@pytest.mark.parametrize("t", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_frames_keep_the_lowest_indices(t, dtype):
    still = video((1, 2, 5)).frames.to(dtype).expand(t, -1, -1, -1).contiguous()
    plan = DyCoke().plan(VisualTokens.from_grid(still, (t, 2, 5)))
    kept = [f * 10 + i for f in range(t) for i in range(3 if f % 4 else 10)]
    assert plan.survivors.tolist() == kept


@pytest.mark.parametrize("value", [0.0, 1.0])
@given(st.integers(1, 7), st.data())
def test_equal_tokens_make_valid_plans_of_any_budget(value, t, data):
    count = data.draw(st.integers(1, 4 * t))
    expected = 4 if t == 1 else count
    tokens = VisualTokens.from_grid(torch.full((t, 2, 2, 4), value), (t, 2, 2))
    plan = DyCoke(keep_ratio=count / (4 * t)).plan(tokens)
    plan.check(4 * t)
    assert plan.num_kept == expected


def test_the_third_frame_is_compared_with_the_first_and_the_fourth_with_the_third():
    a, b = [1.0, 0], [0, 1.0]
    # Places: the same all along; changed in the second frame only; changed in the third for good.
    x = torch.tensor([[a, a, a], [a, b, a], [a, a, b], [a, a, b], [b, b, a]]).view(5, 1, 3, 2)
    plan = DyCoke().plan(VisualTokens.from_grid(x, (5, 1, 3)))
    # The fourth frame is as the third, and so keeps its lowest place.
    assert plan.survivors.tolist() == [0, 1, 2, 3 + 1, 6 + 2, 9 + 0, 12, 13, 14]


@given(st.integers(1, 9), SEEDS, st.data())
def test_a_budget_shares_out_what_the_first_frames_leave(t, seed, data):
    n, windows = 6 * t, math.ceil(t / 4)
    later = t - windows
    least = 6 * windows + later
    assume(least < n)
    count = data.draw(st.integers(least, n - 1))
    tokens = video((t, 2, 3), seed)
    rows = similarities(tokens)
    each, more = divmod(count - 6 * windows, later)
    kept, left = {f * 6 + i for f in range(0, t, 4) for i in range(6)}, []
    for f, row in rows.items():
        order = sorted(range(6), key=row.__getitem__)
        kept |= {f * 6 + i for i in order[:each]}
        left += [(row[i], f * 6 + i) for i in order[each:]]
    kept |= {i for _, i in sorted(left)[:more]}
    assert DyCoke(keep_ratio=count / n).plan(tokens).survivors.tolist() == sorted(kept)


@given(st.integers(2, 9), SEEDS, st.data())
def test_no_frame_is_lost_where_the_budget_holds_one_token_each(t, seed, data):
    count = data.draw(st.integers(1, 6 * t))
    counts = held(video((t, 2, 3), seed), keep_ratio=count / (6 * t))
    assert sum(counts) == count
    assert sum(map(bool, counts)) == min(t, count)


@pytest.mark.parametrize(
    ("count", "first", "between"),
    [
        (56, [10, 10], [6, 6, 6, 6, 6, 6]),
        (26, [10, 10], [1, 1, 1, 1, 1, 1]),
        (25, [9, 10], [1, 1, 1, 1, 1, 1]),
        (16, [5, 5], [1, 1, 1, 1, 1, 1]),
        (8, [1, 1], [1, 1, 1, 1, 1, 1]),
        (5, [1, 1], [0, 0, 0, 1, 1, 1]),
        (2, [1, 1], [0, 0, 0, 0, 0, 0]),
        (1, [0, 1], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_budget_reduces_the_frames_between_before_the_first_ones(count, first, between):
    found = held(video((8, 2, 5), seed=3), keep_ratio=count / 80)
    assert found[::4] == first
    assert sorted(found[1:4] + found[5:]) == between


def test_a_first_frame_that_is_not_whole_keeps_evenly_spaced_places():
    # What is left after one token of the second frame.
    survivors = DyCoke(keep_ratio=3 / 16).plan(video((2, 2, 4))).survivors.tolist()
    assert survivors[:2] == [2, 6]
    assert survivors[2] >= 8


def test_it_never_reads_a_value_and_counts_its_comparisons():
    x = torch.empty(7, 2, 3, 8, device="meta")
    tokens = VisualTokens.from_grid(x, (7, 2, 3), check=False)
    for keep_ratio, count in [(None, 12 + 5), (0.5, 21), (0.3, 13), (1 / 42, 1)]:
        assert DyCoke(keep_ratio=keep_ratio).plan(tokens).survivors.shape == (count,)
    assert DyCoke().matching_flops((7, 2, 3), 8) == 5 * 6 * 8
