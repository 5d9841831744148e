"""VidCom2 against its definition and against the published selection."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open

from tokenfuse.strategies.vidcom2 import VidCom2
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)


def video(grid, seed=0, width=16, spread=0.5):
    """Frames with a scene in common, so that closeness differs."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(width, generator=random) + spread * torch.randn(
        *grid, width, generator=random
    ) * torch.rand(grid[0], 1, 1, 1, generator=random)
    return VisualTokens.from_grid(x, grid)


def plan_of(tokens, **options):
    return VidCom2(**options).plan(tokens)


def scores(tokens, config):
    """Scores and frames' shares, in fp64."""
    t, h, w = tokens.grid
    x = tokens.features.double().view(t, h * w, -1)
    variance = x.flatten(0, 1).var(0, correction=0).tolist()
    order = sorted(range(len(variance)), key=lambda c: variance[c])
    x = x[..., sorted(order[: max(1, int(config.channels * len(order)))])]
    x = torch.nn.functional.normalize(x, dim=-1)

    def close(centre):
        d = (x - centre).square().sum(-1)
        return sum(torch.exp(-d / 2 / 2.0**k) for k in range(-3, 2))

    in_video = close(x.mean((0, 1)))
    u = -in_video.mean(1)
    p = torch.softmax((u - u.max()) / config.temperature, 0)
    scale = (config.keep_ratio * (1 + p - p.mean())).clamp(max=1)
    return in_video + close(x.mean(1, keepdim=True)), scale


def plainly(tokens, config, count):
    """The definition with loops."""
    common, scale = scores(tokens, config)
    t, places = common.shape
    shares = (scale * places).tolist()
    values = sorted(common.flatten().tolist())
    assume(all(b - a > 1e-4 for a, b in pairwise(values)))
    assume(all(abs(share % 1 - 0.5) > 0.01 for share in shares))
    best, kept = set(), set()
    for f in range(t):
        order = sorted(range(places), key=lambda i: common[f, i].item())
        best.add(f * places + order[0])
        kept |= {f * places + i for i in order[: max(1, round(shares[f]))]}
    flat = common.flatten().tolist()
    while len(kept) < count:
        kept.add(min(set(range(t * places)) - kept, key=flat.__getitem__))
    while len(kept) > count:
        kept.remove(max(kept - best if kept - best else kept, key=flat.__getitem__))
    return sorted(kept)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_survivors_and_frame_shares_are_the_published_ones(monkeypatch, case):
    with safe_open(Path(__file__).parents[1] / "data/vidcom2.safetensors", "pt") as file:
        given_ = json.loads(file.metadata()[case])
        x, kept, scales = (
            file.get_tensor(f"{case}.{key}") for key in ("features", "kept", "scales")
        )
    found = []
    original = VidCom2._scales
    monkeypatch.setattr(
        VidCom2, "_scales", lambda self, *args: found.append(original(self, *args)) or found[0]
    )
    grid = (given_["frames"], 1, given_["tokens_per_frame"])
    plan = plan_of(VisualTokens.from_grid(x, grid), keep_ratio=given_["retention"])
    assert torch.equal(plan.survivors, kept)
    torch.testing.assert_close(found[0], scales, rtol=1e-4, atol=1e-5)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 4)),
    SEEDS,
    st.sampled_from([0.3, 0.5, 1.0]),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.data(),
)
def test_survivors_are_those_of_plain_loops(grid, seed, channels, temperature, data):
    n = math.prod(grid)
    count = data.draw(st.integers(1, n))
    config = VidCom2(keep_ratio=count / n, channels=channels, temperature=temperature)
    tokens = video(grid, seed)
    assert config.plan(tokens).survivors.tolist() == plainly(tokens, config, count)


@given(SEEDS, st.integers(1, 1000))
def test_the_count_is_exact_and_no_frame_is_lost_where_the_budget_holds_one_each(seed, thousandths):
    config = VidCom2(keep_ratio=thousandths / 1000)
    tokens = video((6, 3, 3), seed)
    plan = config.plan(tokens)
    plan.check(54)
    assert plan.num_kept == config.num_kept((6, 3, 3)) == math.ceil(thousandths * 54 / 1000)
    assert plan.frame_counts((6, 3, 3)).count_nonzero() == min(6, plan.num_kept)


def test_the_total_does_not_drift_where_the_rounded_shares_do():
    tokens = video((32, 5, 9), spread=0.1)
    config = VidCom2(keep_ratio=0.15)
    _, scale = scores(tokens, config)
    assert (scale * 45).round().sum() != 216
    assert config.plan(tokens).num_kept == 216


@given(SEEDS, st.sampled_from([0.1, 0.25, 0.5, 0.8]))
def test_permuted_frames_keep_the_same_tokens(seed, keep_ratio):
    tokens = video((5, 2, 4), seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = VisualTokens.from_grid(tokens.frames[order], tokens.grid)
    common, scale = scores(tokens, VidCom2(keep_ratio=keep_ratio))
    apart = common.flatten().sort().values.diff().amin() > 1e-4
    assume(apart and ((scale * 8 % 1 - 0.5).abs() > 0.01).all())
    mask = plan_of(tokens, keep_ratio=keep_ratio).keep_mask.view(5, 8)
    assert torch.equal(plan_of(moved, keep_ratio=keep_ratio).keep_mask.view(5, 8), mask[order])


@given(SEEDS)
def test_longer_vectors_are_not_more_common(seed):
    tokens = video((4, 2, 4), seed)
    lengths = 2.0 ** torch.randint(-3, 4, (4, 2, 4, 1), generator=torch.Generator().manual_seed(3))
    scaled = VisualTokens.from_grid(tokens.frames * lengths, tokens.grid)
    # All channels, since which vary least depends on the lengths.
    assert torch.equal(
        plan_of(scaled, channels=1.0).survivors, plan_of(tokens, channels=1.0).survivors
    )


def test_a_frame_unlike_the_others_keeps_more():
    tokens = video((6, 4, 4), spread=0.1)
    x = tokens.frames.clone()
    x[2] = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(9))
    held = plan_of(VisualTokens.from_grid(x, tokens.grid)).frame_counts(tokens.grid)
    assert held[2] > 1.5 * held[[0, 1, 3, 4, 5]].amax()


def test_the_steadiest_channels_are_compared_and_no_others():
    random = torch.Generator().manual_seed(1)
    steady, loud = torch.randn(2, 4, 3, 3, 8, generator=random) * torch.tensor([1.0, 9.0]).view(
        2, 1, 1, 1, 1
    )
    quiet = plan_of(VisualTokens.from_grid(steady, (4, 3, 3)), channels=1.0)
    both = plan_of(VisualTokens.from_grid(torch.cat([loud, steady], -1), (4, 3, 3)))
    assert torch.equal(both.survivors, quiet.survivors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_fp32_whatever_the_dtype(dtype):
    tokens = video((4, 4, 4))
    narrow = tokens.features.to(dtype)
    wide = VisualTokens.from_grid(narrow.float(), tokens.grid)
    narrow = VisualTokens.from_grid(narrow, tokens.grid)
    assert torch.equal(plan_of(narrow).survivors, plan_of(wide).survivors)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_tokens_keep_the_lowest_indices_of_every_frame(value):
    tokens = VisualTokens.from_grid(torch.full((3, 2, 2, 4), value), (3, 2, 2))
    assert plan_of(tokens, keep_ratio=0.5).survivors.tolist() == [0, 1, 4, 5, 8, 9]
    assert plan_of(tokens, keep_ratio=1 / 6).survivors.tolist() == [0, 4]


def test_it_never_reads_a_value_and_counts_its_comparisons():
    tokens = VisualTokens.from_grid(torch.empty(4, 2, 3, 9, device="meta"), (4, 2, 3), check=False)
    assert plan_of(tokens).survivors.shape == (6,)
    assert VidCom2().matching_flops((4, 2, 3), 9) == 2 * 24 * 4


def test_a_frame_whose_share_rounds_to_nothing_competes_with_one_token():
    # Frame 1 is entitled to a quarter of a token, and its best is the least common of all.
    tokens, config = video((2, 1, 3), 1), VidCom2(keep_ratio=1 / 6, channels=0.3)
    common, scale = scores(tokens, config)
    assert scale[1] * 3 < 0.5
    assert common.argmin() == 4
    assert config.plan(tokens).survivors.tolist() == [4]
