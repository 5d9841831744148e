"""PruneVid's merging: scenes, still places, clusters, and how many there are."""

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.ops.select import budget
from tokenfuse.strategies.prunevid import SMALL, PruneVid, scene_runs, steadiness
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 6))


def video(grid, seed=0, scenes=2, noise=0.6, dtype=torch.float32):
    """Scenes of which half of the places stand still, about."""
    rng = torch.Generator().manual_seed(seed)
    t, h, w = grid
    scene = torch.randn(scenes, h, w, 16, generator=rng)[torch.arange(t) * scenes // t]
    moves = torch.rand(1, h, w, 1, generator=rng) < 0.5
    x = scene + torch.where(moves, noise * 4, noise / 4) * torch.randn(t, h, w, 16, generator=rng)
    return VisualTokens.from_grid(x.to(dtype), grid)


def windows_of(config, tokens):
    _, windows = config._windows(tokens)
    return windows


def same_group(windows, places):
    """The number of each source token's group, as (window, still or its own frame)."""
    groups = []
    for number, span in enumerate(windows.spans):
        for frame in span:
            for place in range(places):
                still = bool(windows.still[number, place])
                groups.append((number, None if still else frame))
    return groups


# --- scenes and still places --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "lengths"),
    [
        ("a", [1]),
        ("aaa", [3]),
        ("abc", [3]),  # no run of two: one scene
        ("aabbb", [2, 3]),
        ("aabbaa", [2, 2, 2]),  # both runs of a are its longest
        ("aab", [3]),
        ("aababbb", [2, 5]),  # the block ba joins bbb
        ("aaaabaaa", [8]),  # aaa is not the longest of its label
        ("aabaabb", [5, 2]),  # neighbours of one label are one scene
        ("ccabaa", [4, 2]),  # ab joins cc, the left one on ties
        ("bccaab", [3, 3]),
        ("cacccabbbb", [6, 4]),  # ccc has become ca ccc when a looks for the longer one
    ],
)
def test_what_is_no_longest_run_joins_the_longer_neighbour(labels, lengths):
    assert [len(span) for span in scene_runs(list(labels))] == lengths


def scenes_by_the_rule(labels):
    """The rule, frame by frame."""
    runs = []
    for frame, label in enumerate(labels):
        if runs and runs[-1][0] == label:
            runs[-1][1].append(frame)
        else:
            runs.append((label, [frame]))
    kept = [
        len(run) >= 2 and len(run) == max(len(r) for other, r in runs if other == label)
        for label, run in runs
    ]
    final = [None] * len(labels)
    for (label, run), stays in zip(runs, kept, strict=True):
        for frame in run if stays else []:
            final[frame] = label
    frame = 0
    while frame < len(labels):
        if final[frame] is not None:
            frame += 1
            continue
        stop = frame
        while stop < len(labels) and final[stop] is None:
            stop += 1
        left = right = 0
        while frame - left > 0 and final[frame - left - 1] == final[frame - 1]:
            left += 1
        while stop + right < len(labels) and final[stop + right] == final[stop]:
            right += 1
        beside = final[frame - 1] if left and left >= right else final[stop] if right else 0
        final[frame:stop] = [beside] * (stop - frame)
        frame = stop
    return [len(list(run)) for _, run in groupby(final)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=25))
def test_scenes_are_those_of_the_rule(labels):
    spans = scene_runs(labels)
    assert [i for span in spans for i in span] == list(range(len(labels)))
    assert [len(span) for span in spans] == scenes_by_the_rule(labels)


@given(st.integers(2, 7), st.integers(1, 5), SEEDS)
def test_steadiness_is_the_mean_cosine_of_different_frames(frames, places, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, places, 6, generator=rng)
    x[torch.rand(frames, places, generator=rng) < 0.1] = 0
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    cosines = torch.einsum("apd,bpd->pab", unit, unit)
    off = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    expected = off / (frames * (frames - 1))
    torch.testing.assert_close(steadiness(x).double(), expected, atol=2e-5, rtol=0)


@given(st.integers(1, 9), SEEDS)
def test_a_scene_of_one_frame_has_nothing_still(places, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, places, 8, generator=rng)
    tokens = VisualTokens.from_grid(x.flatten(0, 1), (1, 1, places))
    windows = windows_of(PruneVid(), tokens)
    assert windows.spans == [range(1)]
    assert windows.numbers == [0]
    assert not windows.still.any()


@given(st.integers(2, 7), st.integers(1, 5), SEEDS)
def test_a_still_scene_becomes_one_frame(t, places, seed):
    x = torch.randn(1, places, 8, generator=torch.Generator().manual_seed(seed))
    tokens = VisualTokens.from_grid(x.expand(t, -1, -1).flatten(0, 1), (t, 1, places))
    out = PruneVid(scenes=0.1).compress(tokens)
    assert out.plan.survivors.tolist() == list(range(places))
    torch.testing.assert_close(out.features, x[0])


# --- clusters -----------------------------------------------------------------------------------


@given(GRIDS, SEEDS, st.sampled_from([0.1, 0.25, 0.5]), st.sampled_from([0.3, 0.5, 1.0]))
def test_the_count_is_the_formula_and_nothing_is_lost(grid, seed, scenes, clusters):
    tokens = video(grid, seed)
    config = PruneVid(scenes=scenes, clusters=clusters)
    out = config.compress(tokens)
    out.plan.check(tokens.num_tokens)
    windows, places = windows_of(config, tokens), grid[1] * grid[2]
    still = windows.still.sum(1).tolist()
    assert windows.numbers == still
    sizes = still + [places - n for n, span in zip(still, windows.spans, strict=True) for _ in span]
    expected = sum(n if n <= SMALL else int(clusters * n + 1e-9) for n in sizes)
    assert out.plan.num_kept == expected
    assert (out.plan.target >= 0).all()
    assert out.sizes.sum() == tokens.num_tokens
    total = (out.sizes[:, None] * out.features.double()).sum(0)
    torch.testing.assert_close(total, tokens.features.double().sum(0), atol=1e-3, rtol=1e-4)


@given(GRIDS, SEEDS, st.one_of(st.none(), st.floats(0.02, 0.98)))
def test_a_cluster_is_the_mean_of_tokens_of_one_group(grid, seed, ratio):
    tokens = video(grid, seed)
    config, places = PruneVid(keep_ratio=ratio), grid[1] * grid[2]
    out = config.compress(tokens)
    if ratio:
        assert out.plan.num_kept == budget(ratio, tokens.num_tokens)
    windows = windows_of(config, tokens)
    group = same_group(windows, places)
    for slot, keeper in enumerate(out.plan.survivors.tolist()):
        members = (out.plan.target == slot).nonzero().flatten().tolist()
        assert {group[i] for i in members} == {group[keeper]}
        if group[keeper][1] is None and len(members) > 1:
            assert keeper // places == windows.spans[group[keeper][0]].start
        mean = tokens.features[members].double().mean(0)
        torch.testing.assert_close(out.features[slot].double(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("places", "kept"), [(14, 14), (15, 7), (16, 8), (100, 50)])
def test_an_image_of_more_than_14_tokens_is_halved(places, kept):
    assert PruneVid().plan(video((1, 1, places))).num_kept == kept


def test_every_group_has_a_token_if_there_are_enough():
    tokens = video((8, 4, 4), seed=1)
    config = PruneVid()
    groups = sum(n > 0 for n in windows_of(config, tokens).sizes)
    assert groups > 8
    plan = PruneVid(keep_ratio=groups / 128).plan(tokens)
    assert (plan.target >= 0).all(), "nothing is dropped"


def test_still_tokens_unlike_their_mean_fill_a_budget_that_scenes_leave_open():
    tokens = video((6, 2, 2), scenes=1, noise=0.05)
    x = tokens.frames.flatten(1, 2)
    config = PruneVid(scenes=0.1, keep_ratio=7 / 24)
    assert windows_of(config, tokens).numbers == [4]
    out = config.compress(tokens)
    likeness = torch.cosine_similarity(x[1:], x.mean(0)[None], dim=-1).flatten()
    alone = likeness.argsort()[:3] + 4
    assert out.plan.survivors.tolist() == sorted([0, 1, 2, 3, *alone.tolist()])
    assert torch.equal(out.features[4:], tokens.features[out.plan.survivors[4:]])
    assert (out.plan.target >= 0).all()


def test_two_scenes_are_found_and_merged_apart():
    x = torch.cat([torch.ones(4, 3), -torch.ones(4, 3)]).repeat_interleave(2, 0)
    x = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    out = PruneVid().compress(VisualTokens.from_grid(x, (8, 1, 2)))
    assert out.plan.survivors.tolist() == [0, 1, 8, 9]
    assert out.sizes.tolist() == [4, 4, 4, 4]
