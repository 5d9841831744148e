"""HoliTom's outer stage: what its windows are, and what becomes of the tokens inside."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.ops.select import budget, top_per_row
from tokenfuse.strategies._base import Attention
from tokenfuse.strategies.holitom import HoliTom, best_windows, still_places, still_since
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)


def still(t, places, seed, share):
    return torch.rand(t - 1, places, generator=torch.Generator().manual_seed(seed)) < share


def tables(steps):
    return still_places(still_since(steps)).tolist()


def saved(steps, spans):
    """Tokens that the windows save, from the definition."""
    return sum(
        int(steps[span.start : span[-1]].all(0).sum()) * (len(span) - 1)
        for span in spans
        if len(span) > 1
    )


def cuts_of(t):
    for cut in itertools.product([False, True], repeat=t - 1):
        ends = [i + 1 for i, here in enumerate(cut) if here]
        yield [range(a, b) for a, b in itertools.pairwise([0, *ends, t])]


def video(grid, seed=0, kept=0.6, width=32):
    """Places that mostly stay as they were, and else become something else."""
    rng = torch.Generator().manual_seed(seed)
    t, n = grid[0], grid[1] * grid[2]
    x = torch.randn(t, n, width, generator=rng)
    for i in range(1, t):
        stays = torch.rand(n, 1, generator=rng) < kept
        x[i] = torch.where(stays, x[i - 1] + 0.1 * x[i], x[i])
    saliency = torch.rand(t * n, generator=rng)
    return VisualTokens.from_grid(x.flatten(0, 1), grid, saliency=saliency)


def windows_of(tokens, threshold=0.8):
    x = tokens.frames.flatten(1, 2)
    steps = torch.cosine_similarity(x[:-1], x[1:], dim=-1) > threshold
    spans = best_windows(tables(steps))
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    for span in spans:
        if len(span) > 1:
            mask[span.start : span.stop] = steps[span.start : span[-1]].all(0)
    return spans, mask


GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))


@given(st.integers(1, 9), st.integers(1, 5), SEEDS, st.sampled_from([0.3, 0.6, 0.9]))
def test_the_table_counts_places_that_stand_still_throughout(t, places, seed, share):
    steps = still(t, places, seed, share)
    table = tables(steps)
    for s, e in itertools.combinations(range(t), 2):
        assert table[s][e] == steps[s:e].all(0).sum()


@given(st.integers(1, 8), st.integers(1, 5), SEEDS, st.sampled_from([0.3, 0.6, 0.9]))
def test_no_cut_into_windows_saves_more_up_to_8_frames(t, places, seed, share):
    steps = still(t, places, seed, share)
    found = best_windows(tables(steps))
    assert [i for span in found for i in span] == list(range(t)), "windows partition the video"
    assert saved(steps, found) == max(saved(steps, spans) for spans in cuts_of(t))


def test_what_saves_nothing_stays_single_frames():
    assert best_windows(tables(torch.zeros(4, 3).bool())) == [range(i, i + 1) for i in range(5)]
    steps = torch.tensor([[0, 0], [1, 0], [0, 0]]).bool()
    assert best_windows(tables(steps)) == [range(1), range(1, 3), range(3, 4)]


@given(st.integers(1, 6), st.integers(1, 4), SEEDS)
def test_identical_frames_are_one_window(t, places, seed):
    x = torch.randn(1, places, 8, generator=torch.Generator().manual_seed(seed))
    grid, n = (t, 1, places), t * places
    tokens = VisualTokens.from_grid(x.expand(t, -1, -1).flatten(0, 1), grid, saliency=torch.ones(n))
    out = HoliTom(keep_ratio=places / n).compress(tokens)
    assert out.plan.survivors.tolist() == list(range(places))
    assert (out.sizes == t).all()
    torch.testing.assert_close(out.features, x[0])


@given(GRIDS, SEEDS, st.integers(1, 8))
def test_above_threshold_1_it_is_top_k_of_every_frame(grid, seed, per_frame):
    tokens = video(grid, seed)
    t, places = grid[0], grid[1] * grid[2]
    k = min(per_frame, places)
    out = HoliTom(keep_ratio=k / places, threshold=1).compress(tokens)
    expected = top_per_row(tokens.saliency.view(t, places), torch.full((t,), k)).flatten()
    assert torch.equal(out.plan.survivors, expected.nonzero().flatten())
    assert torch.equal(out.features, tokens.features[out.plan.survivors])
    assert (out.sizes == 1).all()


@given(GRIDS, SEEDS, st.floats(0.05, 0.95), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_merged_token_stays_in_its_window_and_holds_only_its_kind(grid, seed, ratio, share):
    tokens = video(grid, seed)
    places = grid[1] * grid[2]
    spans, mask = windows_of(tokens)
    plan = HoliTom(keep_ratio=ratio, contextual=share).plan(tokens)
    plan.check(tokens.num_tokens)
    assert plan.num_kept == budget(ratio, tokens.num_tokens)
    window = torch.tensor([w for w, span in enumerate(spans) for _ in span])
    first = torch.tensor([spans[w].start for w in window.tolist()])
    for token, slot in enumerate(plan.target.tolist()):
        if slot < 0:
            continue
        keeper = int(plan.survivors[slot])
        frame, at = token // places, keeper // places
        assert window[frame] == window[at]
        assert mask.flatten()[token] == mask.flatten()[keeper], "still and moving do not mix"
        if token != keeper:
            assert at == (first[frame] if mask.flatten()[token] else frame)


@given(GRIDS, SEEDS, st.floats(0.05, 0.95))
def test_moving_survivors_are_inputs_where_nothing_is_contextual(grid, seed, ratio):
    tokens = video(grid, seed)
    _, mask = windows_of(tokens)
    out = HoliTom(keep_ratio=ratio).compress(tokens)
    moving = ~mask.flatten()[out.plan.survivors]
    assert torch.equal(out.features[moving], tokens.features[out.plan.survivors[moving]])
    assert (out.sizes[moving] == 1).all()


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_value_is_beta_of_the_centre_and_the_rest_of_the_mean_of_what_joined(beta, share):
    tokens = video((6, 4, 4), seed=3)
    x, places = tokens.frames.flatten(1, 2).double(), 16
    spans, mask = windows_of(tokens)
    config = HoliTom(keep_ratio=0.2, contextual=share, beta=beta)
    out = config.compress(tokens)
    # Temporal means first, then clusters of them, as the method does it.
    token = x.clone()
    for span in spans:
        inside = slice(span.start, span.stop)
        mean = x[inside].mean(0)
        token[inside] = torch.where(mask[inside, :, None], mean, x[inside])
    flat, joined = token.flatten(0, 1), 0
    for slot, keeper in enumerate(out.plan.survivors.tolist()):
        same_place = torch.arange(96) % places == keeper % places
        others = (out.plan.target == slot) & ~same_place
        value = flat[keeper]
        if others.any():
            value = beta * value + (1 - beta) * flat[others].mean(0)
            joined += 1
        torch.testing.assert_close(out.features[slot].double(), value, rtol=1e-4, atol=1e-5)
    assert joined > 2
    # Other tensors, such as DeepStack features, are fused alike.
    other = tokens.features[:, :5] * 2
    torch.testing.assert_close(config.fuse(out.plan, other), 2 * out.features[:, :5])


def test_still_tokens_unlike_their_mean_fill_a_budget_that_windows_leave_open():
    tokens = video((8, 2, 2), kept=1.0)
    x = tokens.frames.flatten(1, 2)
    out = HoliTom(keep_ratio=6 / 32).compress(tokens)
    assert windows_of(tokens)[0] == [range(8)]
    likeness = torch.cosine_similarity(x[1:], x.mean(0)[None], dim=-1).flatten()
    alone = likeness.argsort()[:2] + 4
    assert out.plan.survivors.tolist() == sorted([0, 1, 2, 3, *alone.tolist()])
    assert (out.sizes[4:] == 1).all()
    assert torch.equal(out.features[4:], tokens.features[out.plan.survivors[4:]])
    rest = torch.ones(32, dtype=torch.bool).index_fill(0, alone, False)
    for place in range(4):
        mine = rest & (torch.arange(32) % 4 == place)
        torch.testing.assert_close(out.features[place], tokens.features[mine].mean(0))


def test_all_moving_tokens_may_be_contextual_in_videos_that_never_stand_still():
    tokens = video((3, 4, 4), kept=0)
    out = HoliTom(keep_ratio=0.25, contextual=1).compress(tokens)
    assert out.plan.frame_counts((3, 4, 4)).tolist() == [4, 4, 4]
    assert out.sizes.sum() == 48, "every token is in some cluster"


@given(GRIDS, SEEDS)
def test_every_group_has_a_token_if_there_are_enough(grid, seed):
    tokens = video(grid, seed)
    spans, mask = windows_of(tokens)
    groups = (~mask).any(1).sum() + sum(bool(mask[span.start].any()) for span in spans)
    ratio = int(groups) / tokens.num_tokens
    plan = HoliTom(keep_ratio=ratio, contextual=1).plan(tokens)
    assert (plan.target >= 0).all()


def test_it_reads_what_all_queries_pay_in_the_last_block():
    assert HoliTom().needed().attention == Attention(-1, "each")
    assert HoliTom(block=-3).needed().attention == Attention(-3, "each")


def test_windows_partition_a_long_video():
    spans = best_windows(tables(still(200, 3, 0, 0.9)))
    assert [i for span in spans for i in span] == list(range(200))
    assert 1 < len(spans) < 200
