"""EarlyTom: groups, pairs and windows against loops that say the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse import VisualTokens, get_strategy
from tokenfuse.errors import ConfigError
from tokenfuse.strategies._tower import TowerTokens
from tokenfuse.strategies.earlytom import merges, spread_best


def view(states, sizes=None):
    frames = len(states)
    sizes = torch.ones(frames, dtype=torch.long) if sizes is None else sizes
    coords = torch.arange(frames)[:, None] * torch.tensor([1, 0, 0])
    return TowerTokens(states, coords, sizes, (frames, 1, 1), 1, 3, frames=True)


def frames_like(*likeness):
    """Frames ``(T, 1, 2)`` of one place each, by the angle in which they look."""
    angles = torch.tensor(likeness)
    return torch.stack([angles.cos(), angles.sin()], -1)[:, None]


def written_out(states, threshold, most):
    """Who goes into whom, frame by frame."""

    def alike(i, j):
        return float(torch.cosine_similarity(states[i], states[j], dim=-1).mean())

    groups, running = [[0]], 1.0
    for i in range(1, len(states)):
        first = groups[-1][0]
        running = 0.9 * alike(i, first) + 0.1 * running
        if len(groups[-1]) < most and running >= threshold:
            groups[-1].append(i)
        else:
            groups.append([i])
            running = 1.0
    roots = list(range(len(states)))
    for group in groups:
        middle = group[1:-1]
        while len(middle) >= 2:
            a, b = middle[0], middle[1]
            if alike(a, b) >= max(alike(group[0], group[-1]), alike(b, b + 1)):
                roots[b] = a
                middle = middle[2:]
            else:
                middle = middle[1:]
    return roots


@given(
    seed=st.integers(0, 2**31),
    frames=st.integers(1, 14),
    threshold=st.sampled_from([-1.0, 0.3, 0.8, 0.95]),
    most=st.integers(1, 8),
)
def test_groups_and_pairs_are_those_of_a_loop(seed, frames, threshold, most):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(frames, 3, 5, generator=generator).double() * 0.4
    states = (steps.cumsum(0) + 1.0).float()
    strategy = get_strategy("earlytom", threshold=threshold, most_frames=most)
    plan = strategy._merge(view(states))
    roots = written_out(states.double(), threshold, most)
    found = list(range(frames)) if plan is None else plan.survivors[plan.target].tolist()
    assert found == roots


def test_pairs_between_the_ends_of_a_group_merge_by_how_alike_they_are():
    states = frames_like(0.0, 0.3, 0.32, 0.6, 0.62, 0.9)
    plan = get_strategy("earlytom", threshold=-1.0)._merge(view(states))
    assert plan.survivors.tolist() == [0, 1, 3, 5]
    assert plan.target.tolist() == [0, 1, 1, 2, 2, 3]
    alike = [float(torch.tensor(angle).cos()) for angle in (0.02, 0.28)]
    expected = (states[1] * alike[0] + states[2] * alike[1]) / sum(alike)
    torch.testing.assert_close(plan.mean(states.flatten(1))[1], expected[0])
    # What stands for more weighs more.
    sizes = torch.tensor([1, 3, 1, 1, 1, 1])
    plan = get_strategy("earlytom", threshold=-1.0)._merge(view(states, sizes))
    expected = (states[1] * alike[0] * 3 + states[2] * alike[1]) / (3 * alike[0] + alike[1])
    torch.testing.assert_close(plan.mean(states.flatten(1))[1], expected[0])


def test_what_merges_never_vanishes():
    """Each frame is a part of exactly one, and none of a group's ends merges."""
    likeness = [[1.0] * 7, [1.0] * 7]
    likeness += [[1.0] * 7] * 5
    roots, weights = merges(likeness, 0, 7)
    assert roots == [0, 1, 1, 3, 3, 5, 6]
    assert min(weights) > 0
    assert merges(likeness, 0, 2)[0] == [0, 1]


def test_unlike_frames_stay():
    states = frames_like(0.0, 1.5, 3.0, 1.5, 0.0)
    assert get_strategy("earlytom", threshold=0.9)._merge(view(states)) is None


@given(seed=st.integers(0, 2**31), keep=st.sampled_from([0.05, 0.2, 0.5, 0.9]))
def test_the_budget_is_met_and_spread_over_still_frames(seed, keep):
    generator = torch.Generator().manual_seed(seed)
    t, h, w = 7, 3, 4
    base = torch.randn(1, h * w, 6, generator=generator)
    features = base + 0.05 * torch.randn(t, h * w, 6, generator=generator)
    saliency = torch.rand(t * h * w, generator=generator)
    tokens = VisualTokens.from_grid(features.flatten(0, 1), (t, h, w), saliency=saliency)
    plan = get_strategy("earlytom", keep_ratio=keep, most_frames=7).plan(tokens)
    count = -(-int(keep * 1000) * t * h * w // 1000)
    assert plan.num_kept == count
    counts = plan.frame_counts((t, h, w)).tolist()
    assert max(counts) - min(counts) <= 1
    kept, scores = plan.keep_mask.view(t, -1), saliency.view(t, -1)
    for frame in range(t):
        own = kept[frame].nonzero().flatten().tolist()
        quota = counts[frame]
        if frame in (0, t - 1):
            assert own == sorted(scores[frame].topk(quota).indices.tolist())
        else:
            windows = [place * quota // (h * w) for place in range(h * w)]
            for window in range(quota):
                inside = [p for p in range(h * w) if windows[p] == window]
                best = max(inside, key=lambda p: float(scores[frame, p]))
                assert [p for p in own if windows[p] == window] == [best]


def test_windows_of_quotas_that_differ():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.1, 0.9, 0.3, 0.2], [0.5, 0.5, 0.5, 0.5]])
    found = spread_best(scores, torch.tensor([[1], [2], [3]]))
    assert found.int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]]
    assert not spread_best(scores, torch.tensor([[0], [0], [0]])).any()


def test_bare_tokens_and_options():
    tokens = VisualTokens.from_grid(torch.randn(8, 2), (2, 2, 2))
    with pytest.raises(ConfigError, match="or a keep_ratio"):
        get_strategy("earlytom").plan(tokens)
    with pytest.raises(ConfigError, match=r"do not rise; expected \[3, 9\]"):
        get_strategy("earlytom", blocks=[9, 3])
    blocks = [cut.block for cut in get_strategy("earlytom").tower_cuts(27)]
    assert blocks == [9, 22, 24]
    assert [cut.block for cut in get_strategy("earlytom").tower_cuts(12)] == [4, 10, 11]
    assert all(cut.frames for cut in get_strategy("earlytom", blocks=5).tower_cuts(27))
