"""VisionZip against its definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.config import get_strategy
from tokenfuse.errors import TokensError
from tokenfuse.strategies.visionzip import VisionZip
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))


def video(grid, seed=0, width=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(math.prod(grid), width, generator=random).to(dtype)
    saliency = torch.rand(math.prod(grid), generator=random)
    return VisualTokens.from_grid(x, grid, saliency=saliency)


def loops(tokens, quotas):
    """Survivors and roots by the definition, one token at a time."""
    places = tokens.grid[1] * tokens.grid[2]
    x = torch.nn.functional.normalize(tokens.features.double(), dim=-1)
    survivors, roots = [], [-1] * tokens.num_tokens
    for f, (dominant, contextual) in enumerate(quotas):
        frame = range(f * places, (f + 1) * places)
        kept = sorted(frame, key=lambda i: (-float(tokens.saliency[i]), i))[:dominant]
        rest = [i for i in frame if i not in kept]
        step = max(1, len(rest) // contextual) if contextual else 1
        targets = [rest[k * step] for k in range(contextual)]
        for i in rest:
            if targets:
                roots[i] = max(targets, key=lambda t: float(x[i] @ x[t]))
        for i in kept + targets:
            roots[i] = i
        survivors += kept + targets
    return sorted(survivors), roots


@given(GRIDS, st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**32))
def test_native_counts_agree_with_plain_loops(grid, dominant, contextual, seed):
    tokens = video(grid, seed)
    config = VisionZip(dominant=dominant, contextual=contextual)
    plan = config.plan(tokens)
    plan.check(tokens.num_tokens)
    assert plan.num_kept == config.num_kept(grid)
    if dominant + contextual >= grid[1] * grid[2]:
        assert plan.is_identity
        return
    survivors, roots = loops(tokens, [(dominant, contextual)] * grid[0])
    assert plan.survivors.tolist() == survivors
    found = torch.where(plan.target < 0, -1, plan.survivors[plan.target])
    assert found.tolist() == roots


@given(GRIDS, st.data(), st.sampled_from([0.0, 10 / 64, 0.5, 1.0]))
def test_a_budget_is_shared_evenly_by_the_frames_and_split_in_each(grid, data, share):
    n = math.prod(grid)
    count = data.draw(st.integers(1, n))
    tokens = video(grid, data.draw(st.integers(0, 2**32)))
    config = VisionZip(keep_ratio=count / n, contextual_share=share)
    plan = config.plan(tokens)
    plan.check(n)
    assert plan.num_kept == count
    counts = plan.frame_counts(grid)
    assert counts.max() - counts.min() <= 1
    dropped = (plan.target < 0).view(grid[0], -1).any(-1)
    if share and count < n:
        assert torch.equal(dropped, counts < torch.tensor(grid[1] * grid[2]).clamp_max(2))
    # Nothing goes to another frame.
    places = grid[1] * grid[2]
    kept = plan.target >= 0
    frame = tokens.coords[:, 0]
    assert torch.equal((plan.survivors // places)[plan.target[kept]], frame[kept])


def test_the_share_of_contextual_tokens_is_the_published_one():
    tokens = video((2, 24, 24))
    sizes = VisionZip(keep_ratio=128 / 1152, merge="mean").compress(tokens).sizes
    assert sizes.shape == (128,)
    native = VisionZip().plan(tokens)
    budget = VisionZip(keep_ratio=128 / 1152).plan(tokens)
    assert torch.equal(native.survivors, budget.survivors)
    assert torch.equal(native.target, budget.target)


def test_dominant_tokens_stay_to_the_bit_and_targets_get_the_mean_of_what_comes_in():
    x = torch.tensor([[5.0, 5, 1], [1, 0, 0], [2, 0, 0], [0, 1, 0], [0, 3, 0], [0, 5, 0]])
    tokens = VisualTokens.from_grid(x, (1, 1, 6), saliency=torch.tensor([9.0, 0, 0, 0, 0, 0]))
    # Of the five others, every second: tokens 1 and 3.
    paper = VisionZip(dominant=1, contextual=2).compress(tokens)
    assert paper.plan.survivors.tolist() == [0, 1, 3]
    assert paper.plan.target.tolist() == [0, 1, 1, 2, 2, 2]
    assert paper.features.tolist() == [[5, 5, 1], [3, 0, 0], [0, 5, 0]]
    mean = VisionZip(dominant=1, contextual=2, merge="mean").compress(tokens)
    assert mean.features.tolist() == [[5, 5, 1], [1.5, 0, 0], [0, 3, 0]]


@given(GRIDS, st.integers(0, 2**32))
def test_the_mean_conserves_the_sum_where_nothing_is_dropped(grid, seed):
    tokens = video(grid, seed)
    out = VisionZip(dominant=1, contextual=2, merge="mean").compress(tokens)
    assert out.sizes.sum() == tokens.num_tokens
    total = (out.sizes[:, None] * out.features).sum(0)
    torch.testing.assert_close(total, tokens.features.sum(0), rtol=1e-4, atol=1e-4)


def test_a_target_that_absorbs_nothing_is_not_lengthened():
    tokens = VisualTokens.from_grid(torch.eye(4), (1, 2, 2), saliency=torch.ones(4))
    out = VisionZip(dominant=1, contextual=2).compress(tokens)
    assert out.plan.survivors.tolist() == [0, 1, 2]
    # Token 3 is as unlike both targets: the lower takes it.
    assert out.features.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_the_same_and_keeps_its_dtype(dtype):
    x = video((3, 4, 4), dtype=dtype)
    config = VisionZip(keep_ratio=0.3)
    wide = VisualTokens.from_grid(x.features.float(), x.grid, saliency=x.saliency)
    out, expected = config.compress(x), config.compress(wide)
    assert torch.equal(out.plan.target, expected.plan.target)
    assert out.features.dtype == dtype
    assert torch.equal(out.features, expected.features.to(dtype))


def test_zeros_and_equal_saliency_make_a_valid_plan():
    tokens = VisualTokens.from_grid(torch.zeros(12, 4), (2, 2, 3), saliency=torch.zeros(12))
    out = VisionZip(dominant=2, contextual=1).compress(tokens)
    out.plan.check(12)
    assert out.plan.survivors.tolist() == [0, 1, 2, 6, 7, 8]
    assert out.plan.target.tolist() == [0, 1, 2, 2, 2, 2, 3, 4, 5, 5, 5, 5]


@pytest.mark.parametrize("keep_ratio", [None, 0.05, 0.4])
def test_no_value_is_ever_read(keep_ratio):
    x, saliency = torch.empty(40, 8, device="meta"), torch.empty(40, device="meta")
    tokens = VisualTokens.from_grid(x, (4, 2, 5), saliency=saliency, check=False)
    out = VisionZip(dominant=3, contextual=2, keep_ratio=keep_ratio).compress(tokens)
    assert out.features.shape == (20 if keep_ratio is None else 40 * keep_ratio, 8)


def test_it_asks_for_the_penultimate_block_and_needs_saliency():
    assert VisionZip().needed().attention == (-2, "each")
    assert VisionZip(block=-1).needed().attention == (-1, "each")
    with pytest.raises(TokensError, match="saliency"):
        VisionZip(keep_ratio=0.5).plan(VisualTokens.from_grid(torch.randn(4, 2), (1, 2, 2)))


def test_the_preset_is_what_was_published():
    assert get_strategy("visionzip-published") == VisionZip()


def test_matching_flops_count_targets_with_what_is_not_dominant():
    assert VisionZip().matching_flops((2, 24, 24), 100) == 2 * (576 - 54) * 10 * 100
    assert VisionZip().matching_flops((2, 8, 8), 100) == 0
    assert VisionZip(keep_ratio=3 / 32).matching_flops((2, 4, 4), 7) == (15 * 1 + 15 * 0) * 7
