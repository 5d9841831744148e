"""DivPrune against its definition."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tokenfuse.ops import CHUNK
from tokenfuse.ops.similarity import STEP
from tokenfuse.strategies import divprune
from tokenfuse.strategies.divprune import DivPrune, farthest_first
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@st.composite
def features(draw):
    """Noise, or few different vectors."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    n, d = draw(st.integers(2, 24)), draw(st.integers(2, 8))
    if draw(st.booleans()):
        return torch.randn(n, d, generator=random)
    return torch.randint(1, 3, (n, d), generator=random).float()


def distances(x):
    x = torch.nn.functional.normalize(x.double(), dim=1)
    return 1 - x @ x.T


def plan(x, count):
    tokens = VisualTokens.from_grid(x, (1, 1, x.shape[0]))
    return DivPrune(keep_ratio=count / x.shape[0]).plan(tokens)


@given(features())
def test_each_pick_is_the_greedy_one(x):
    n, d = x.shape[0], distances(x)
    picks = farthest_first(x, n).tolist()
    # The published form: the second-smallest distance of each column, one's own being 0.
    nearest_other = d.sort(0).values[1]
    assert nearest_other[picks[0]] >= nearest_other.max() - 2 * STEP
    for i in range(1, n):
        rest = [j for j in range(n) if j not in picks[:i]]
        gap = {j: d[j, picks[:i]].min() for j in rest}
        best = max(gap.values())
        assert gap[picks[i]] >= best - 2 * STEP
        # Of what is equal, the lowest index.
        assert not any(gap[j] >= best - 1e-9 and j < picks[i] for j in rest if gap[picks[i]] < best)


@pytest.mark.parametrize("seed", range(10))
def test_picks_equal_brute_force_on_noise(seed):
    x = noise(60, 16, seed)
    d = distances(x)
    other = d.clone().fill_diagonal_(math.inf)
    expected = [int(other.amin(0).argmax())]
    while len(expected) < 60:
        gap = d[:, expected].amin(1)
        gap[expected] = -math.inf
        expected.append(int(gap.argmax()))
    assert farthest_first(x, 60).tolist() == expected
    for count in (1, 7, 30, 59):
        assert plan(x, count).survivors.tolist() == sorted(expected[:count])


@given(features(), st.data())
def test_a_smaller_budget_keeps_a_part_of_what_a_larger_one_keeps(x, data):
    n = x.shape[0]
    small, large = sorted(data.draw(st.tuples(st.integers(1, n), st.integers(1, n))))
    assert torch.equal(farthest_first(x, large)[:small], farthest_first(x, small))
    assert set(plan(x, small).survivors.tolist()) <= set(plan(x, large).survivors.tolist())


@given(features())
def test_the_least_distance_of_survivors_never_grows_with_the_budget(x):
    d = distances(x).fill_diagonal_(math.inf)
    least = []
    for count in range(2, x.shape[0] + 1):
        kept = plan(x, count).survivors
        least.append(float(d[kept][:, kept].min()))
    assert all(after <= before + STEP for before, after in pairwise(least))


@given(features(), st.integers(-20, 20))
def test_the_length_of_a_token_does_not_matter(x, exponent):
    lengths = 2.0 ** torch.arange(x.shape[0])[:, None].remainder(5) * 2.0**exponent
    assert torch.equal(farthest_first(x * lengths, x.shape[0]), farthest_first(x, x.shape[0]))


def test_duplicates_are_picked_once_each_and_only_after_all_that_is_different():
    x = noise(20).repeat(200, 1)[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    picks = farthest_first(x, 100)
    assert len(set(picks.tolist())) == 100
    assert len(x[picks[:20]].unique(dim=0)) == 20
    assert picks[20:].tolist() == sorted(set(range(4000)) - set(picks[:20].tolist()))[:80]


def test_identical_tokens_keep_the_lowest_indices():
    assert farthest_first(torch.ones(9, 4), 9).tolist() == list(range(9))


def test_blank_tokens_come_last():
    x = noise(12)
    x[[0, 3, 7]] = 0
    assert farthest_first(x, 12)[-3:].tolist() == [0, 3, 7]
    assert farthest_first(torch.zeros(5, 4), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_picks_what_full_precision_picks(dtype):
    x = noise(50, 16).to(dtype)
    assert torch.equal(farthest_first(x, 50), farthest_first(x.float(), 50))


def test_many_tokens_make_the_same_picks_as_few(monkeypatch):
    x = noise(100, 16)
    expected = farthest_first(x, 60)
    monkeypatch.setattr(divprune, "CHUNK", 100)
    assert torch.equal(farthest_first(x, 60), expected)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def meta_tokens(grid, width):
    """Tokens without data: reading any value of them, or of what is made of them, raises."""
    return VisualTokens.from_grid(torch.empty(*grid, width, device="meta"), grid, check=False)


def test_a_long_video_is_planned_without_all_pairs_and_without_reading_a_value():
    tokens = meta_tokens((64, 24, 24), 64)
    with Largest() as largest:
        assert DivPrune(keep_ratio=0.001).plan(tokens).num_kept == 37
    assert largest.size <= CHUNK < tokens.num_tokens**2


def test_no_value_is_read():
    assert DivPrune().compress(meta_tokens((4, 5, 5), 8)).features.shape == (10, 8)


def test_the_default_is_the_published_share_rounded_up():
    assert DivPrune().num_kept((1, 10, 100)) == 98
    assert DivPrune().num_kept((1, 24, 24)) == math.ceil(0.098 * 576) == 57


def test_matching_flops_count_each_pair_once_and_rows_once_more_where_they_are_many():
    assert DivPrune().matching_flops((1, 10, 100), 8) == 8 * 1000 * 999 // 2
    n = 64 * 24 * 24
    again = (math.ceil(0.098 * n) - 1) * n
    assert DivPrune().matching_flops((64, 24, 24), 8) == 8 * (n * (n - 1) // 2 + again)
