"""FastVID: how the budget is shared, what stays as it was and what anchors become."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.ops.select import budget
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies._base import Attention
from tokenfuse.strategies.fastvid import FastVID
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
SIMILAR = st.lists(st.sampled_from([-2.0, 0.5, 0.9, 0.9, 0.97, 0.97, 1.0]), max_size=20)


@st.composite
def configs(draw, **fixed):
    options = {
        "segments": draw(st.sampled_from([1, 2, 8])),
        "threshold": draw(st.sampled_from([-1, 0.84, 2])),
        "alike": draw(st.sampled_from([-1, 0.95, 2])),
        "context": draw(st.sampled_from([0, 0.4, 1])),
        "anchor_every": draw(st.sampled_from([1, 2, 4])),
        "keep_ratio": draw(st.floats(0.02, 0.98)),
    }
    return FastVID(**{**options, **fixed})


def video(grid, seed=0, scenes=3, noise=0.5, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    t, h, w = grid
    scene = torch.randn(scenes, h, w, 16, generator=rng)
    x = scene[torch.arange(t) * scenes // t] + noise * torch.randn(t, h, w, 16, generator=rng)
    saliency = torch.rand(t * h * w, generator=rng)
    return VisualTokens.from_grid(x.to(dtype), grid, saliency=saliency)


def shares(config, tokens):
    """How the video is shared out, as `choose` does it."""
    means = tokens.frames.flatten(1, 2).float().mean(1)
    similar = torch.cosine_similarity(means[:-1], means[1:], dim=-1).tolist()
    places = tokens.grid[1] * tokens.grid[2]
    return config._share(similar, budget(config.keep_ratio, tokens.num_tokens), places)


# --- sharing the budget out ---------------------------------------------------------------------


@given(configs(), SIMILAR, st.integers(1, 20))
def test_segments_partition_the_video_and_shares_are_exact(config, similar, places):
    t = len(similar) + 1
    count = budget(config.keep_ratio, t * places)
    share = config._share(similar, count, places)
    assert [i for span in share.segments for i in span] == list(range(t))
    assert all(len(span) for span in share.segments)
    assert sum(share.anchors) + sum(share.salient) == count
    for anchors, salient in zip(share.anchors, share.salient, strict=True):
        assert min(anchors, salient) >= 0
        assert anchors + salient <= places


@given(configs(), SIMILAR)
def test_a_segment_ends_at_the_least_similar_pairs_and_at_all_below_the_threshold(config, similar):
    ends = [span[-1] for span in config._share(similar, 1, 4).segments[:-1]]
    order = sorted(range(len(similar)), key=lambda i: (similar[i], i))
    least = order[: config.segments - 1]
    assert ends == sorted({*least, *(i for i in order if similar[i] < config.threshold)})


@given(configs(), SIMILAR, st.integers(1, 20))
def test_only_last_frames_of_runs_carry_budget_until_all_of_them_are_full(config, similar, places):
    t = len(similar) + 1
    share = config._share(similar, budget(config.keep_ratio, t * places), places)
    last = {span[-1] for span in share.segments}
    carriers = last | {i for i, s in enumerate(similar) if s < config.alike}
    used = [a + s for a, s in zip(share.anchors, share.salient, strict=True)]
    if any(used[i] for i in range(t) if i not in carriers):
        assert all(used[i] == places for i in carriers)
    for span in share.segments:
        inside = [i for i in span if i in carriers]
        assert {i for i in span if share.anchors[i]} <= set(inside[::-1][:: config.anchor_every])
        for i in span if len(span) > 1 else []:
            assert share.anchors[i] <= places // 2


@given(configs(), SIMILAR, st.integers(1, 20))
def test_a_segment_with_room_gets_what_truncation_would_give_it_at_least(config, similar, places):
    t = len(similar) + 1
    share = config._share(similar, budget(config.keep_ratio, t * places), places)
    per_frame = int(places * config.keep_ratio)
    for span in share.segments:
        inside = slice(span.start, span.stop)
        used = sum(share.anchors[inside]) + sum(share.salient[inside])
        runs = sum(i == span[-1] or similar[i] < config.alike for i in span)
        assert used >= min(per_frame * len(span), runs * places)


def test_the_published_defaults_share_eight_single_frames_alike():
    share = FastVID()._share([0.5] * 7, 8 * 27, 100)
    assert share.segments == [range(i, i + 1) for i in range(8)]
    assert share.anchors == [10] * 8
    assert share.salient == [17] * 8


def test_context_goes_to_every_fourth_run_from_the_end_and_salience_to_all():
    # One segment of ten runs; the budget of 40 gives 16 anchors to runs 1, 5 and 9.
    config = FastVID(segments=1, threshold=0)
    share = config._share([0.9] * 9, 40, 64)
    assert share.anchors == [0, 5, 0, 0, 0, 5, 0, 0, 0, 6]
    assert share.salient == [3, 3, 3, 3, 2, 2, 2, 2, 2, 2]


def test_the_latest_run_gets_what_cannot_be_shared_evenly():
    config = FastVID(segments=1, threshold=0, context=1, anchor_every=1)
    assert config._share([0.9] * 4, 6, 64).anchors == [1, 1, 1, 1, 2]


def test_what_one_segment_cannot_carry_goes_to_the_others():
    # Two segments of five frames; the first is one run of 10 places, the second five.
    config = FastVID(segments=2, threshold=0)
    share = config._share([1.0] * 4 + [0.1] + [0.9] * 4, 50, 10)
    used = [a + s for a, s in zip(share.anchors, share.salient, strict=True)]
    assert used[:5] == [0, 0, 0, 0, 10]
    assert sum(used[5:]) == 40


# --- what becomes of the tokens -----------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 9), SEEDS)
def test_of_identical_frames_only_the_last_of_segments_survive(t, places, seed):
    x = torch.randn(1, places, 8, generator=torch.Generator().manual_seed(seed))
    tokens = VisualTokens.from_grid(
        x.expand(t, -1, -1).flatten(0, 1), (t, 1, places), saliency=torch.ones(t * places)
    )
    config = FastVID(keep_ratio=min(3, t) / t, segments=3)
    plan = config.plan(tokens)
    # Of equals the first pairs are the least similar.
    last = [0, 1, t - 1] if t > 2 else list(range(t))
    counts = plan.frame_counts(tokens.grid).tolist()
    assert [i for i, n in enumerate(counts) if n] == last


@given(GRIDS, SEEDS, configs())
def test_attended_tokens_are_inputs_and_the_most_attended_of_their_frame(grid, seed, config):
    tokens = video(grid, seed)
    places = grid[1] * grid[2]
    out = config.compress(tokens)
    out.plan.check(tokens.num_tokens)
    assert out.plan.num_kept == budget(config.keep_ratio, tokens.num_tokens)
    share = shares(config, tokens)
    slots = out.plan.target
    for frame, number in enumerate(share.salient):
        attention = tokens.saliency[frame * places : (frame + 1) * places]
        for i in attention.argsort(descending=True, stable=True)[:number].tolist():
            slot = slots[frame * places + i]
            assert slot >= 0
            assert out.sizes[slot] == 1
            assert torch.equal(out.features[slot], tokens.features[frame * places + i])


@given(GRIDS, SEEDS, configs())
def test_every_other_token_joins_the_most_similar_anchor_of_its_segment(grid, seed, config):
    tokens = video(grid, seed)
    places = grid[1] * grid[2]
    plan, share = config.plan(tokens), shares(config, tokens)
    x = torch.nn.functional.normalize(tokens.features.double(), dim=-1)
    kept = plan.keep_mask
    attended = torch.zeros_like(kept)
    for frame, number in enumerate(share.salient):
        inside = tokens.saliency[frame * places : (frame + 1) * places]
        order = inside.argsort(descending=True, stable=True)[:number]
        attended[order + frame * places] = True
    for span in share.segments:
        inside = range(span.start * places, span.stop * places)
        anchors = [i for i in inside if kept[i] and not attended[i]]
        assert len(anchors) == sum(share.anchors[span.start : span.stop])
        for i in inside:
            if kept[i]:
                continue
            if not anchors:
                assert plan.target[i] == -1
                continue
            keeper = int(plan.survivors[plan.target[i]])
            assert keeper in anchors
            assert x[i] @ x[keeper] >= (x[anchors] @ x[i]).max() - 2e-5


@given(GRIDS, SEEDS, st.floats(0, 1))
def test_an_anchor_is_a_weighted_mean_of_itself_and_what_joined_it(grid, seed, beta):
    tokens = video(grid, seed)
    config = FastVID(segments=2, threshold=0, beta=beta)
    out = config.compress(tokens)
    x = tokens.features.double()
    for slot, keeper in enumerate(out.plan.survivors.tolist()):
        joined = (out.plan.target == slot).nonzero().flatten()
        joined = joined[joined != keeper]
        value = x[keeper]
        if len(joined):
            weight = max(1 / (len(joined) + 1), beta)
            value = weight * value + (1 - weight) * x[joined].mean(0)
        torch.testing.assert_close(out.features[slot].double(), value, rtol=1e-4, atol=1e-5)


@given(GRIDS, SEEDS, configs(beta=1))
def test_beta_1_is_pure_selection(grid, seed, config):
    tokens = video(grid, seed)
    out = config.compress(tokens)
    assert torch.equal(out.features, tokens.features[out.plan.survivors])


def test_some_tokens_do_join_anchors_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tokens = video((12, 6, 6), noise=0.1, dtype=dtype)
        config = FastVID(segments=3)
        out = config.compress(tokens)
        assert out.sizes.max() > 2
        assert out.sizes.sum() == tokens.num_tokens
        assert out.features.dtype == dtype
        # Other tensors, such as DeepStack features, are fused alike.
        assert torch.equal(config.fuse(out.plan, tokens.features[:, :3]), out.features[:, :3])


@pytest.mark.parametrize("grid", [(1, 3, 5), (1, 1, 1), (2, 2, 2), (7, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("ratio", [0.01, 0.27, 0.9])
def test_fewer_frames_than_segments_and_tiny_frames_keep_the_exact_count(grid, ratio):
    tokens = video(grid)
    plan = FastVID(keep_ratio=ratio).plan(tokens)
    assert plan.num_kept == math.ceil(ratio * tokens.num_tokens)


def test_the_identity_fuses_to_the_input():
    tokens = video((2, 2, 2))
    plan = FusionPlan.identity(8)
    assert torch.equal(FastVID().fuse(plan, tokens.features), tokens.features)


def test_it_reads_what_the_mean_query_pays_in_the_last_block():
    assert FastVID().needed().attention == Attention(-1, "mean")
    assert FastVID(block=-3).needed().attention == Attention(-3, "mean")
