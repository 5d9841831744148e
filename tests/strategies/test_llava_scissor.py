"""LLaVA-Scissor: connected components, checked against plain loops."""

import importlib
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenfuse import VisualTokens, get_strategy
from tokenfuse.ops.similarity import cosine
from tokenfuse.strategies.llava_scissor import LLaVAScissor

pytestmark = pytest.mark.usefixtures("one_thread")

module = importlib.import_module("tokenfuse.strategies.llava_scissor")
# An only token is an identity plan, without components.
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)).filter(
    lambda g: g != (1, 1, 1)
)
THRESHOLDS = st.sampled_from([-0.5, 0.0, 0.3, 0.6, 0.9])


def tokens_of(grid, seed, width=4, noise=0.3):
    """Few directions with noise, so that some tokens are alike."""
    torch.manual_seed(seed)
    n = math.prod(grid)
    directions = torch.randn(5, width)
    x = directions[torch.randint(5, (n,))] + noise * torch.randn(n, width)
    return VisualTokens.from_grid(x, grid)


def similar(x, y):
    return cosine(x[None], y[None])[0]


def flood(linked):
    """The component of each node of a graph, numbered by their lowest node, by plain search."""
    n = len(linked)
    label = [-1] * n
    for start in range(n):
        if label[start] >= 0:
            continue
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if label[node] < 0:
                label[node] = start
                waiting += [other for other in range(n) if linked[node][other]]
    return label


def by_loops(tokens, threshold):
    """Component tokens in order of their lowest member, and which of them each token is part of."""
    places = tokens.grid[1] * tokens.grid[2]
    members, means = [], []
    for first in range(0, tokens.num_tokens, places):
        frame = tokens.features[first : first + places]
        label = flood((similar(frame, frame) > threshold).tolist())
        for root in sorted(set(label)):
            group = [first + i for i, own in enumerate(label) if own == root]
            members.append(group)
            means.append(tokens.features[group].mean(0))
    means = torch.stack(means)
    label = flood((similar(means, means) > threshold).tolist())
    component, values = {}, []
    for number, root in enumerate(sorted(set(label))):
        parts = [i for i, own in enumerate(label) if own == root]
        values.append(means[parts].mean(0))
        for part in parts:
            component |= dict.fromkeys(members[part], number)
    return torch.stack(values), [component[i] for i in range(tokens.num_tokens)]


@given(GRIDS, st.integers(0, 10**6), THRESHOLDS)
def test_component_tokens_are_those_of_plain_search(grid, seed, threshold):
    tokens = tokens_of(grid, seed)
    values, component = by_loops(tokens, threshold)
    plan = LLaVAScissor(threshold=threshold).plan(tokens)
    assert plan.num_kept == len(values)
    # One survivor stands in each component.
    stands = [component[i] for i in plan.survivors.tolist()]
    assert sorted(stands) == list(range(len(values)))
    torch.testing.assert_close(plan.components(tokens.features), values[stands])


@given(GRIDS, st.integers(0, 10**6), THRESHOLDS)
def test_every_token_joins_the_component_token_that_it_is_most_like(grid, seed, threshold):
    tokens = tokens_of(grid, seed)
    strategy = LLaVAScissor(threshold=threshold)
    plan = strategy.plan(tokens)
    start = plan.components(tokens.features)
    alike = similar(tokens.features, start)
    kept = plan.keep_mask
    joined = alike.gather(1, plan.target[:, None])[:, 0]
    torch.testing.assert_close(joined[~kept], alike.amax(1)[~kept], atol=2e-5, rtol=0)
    # A component token is averaged with all that joined it, as one more.
    fused = strategy.fuse(plan, tokens.features)
    for slot in range(plan.num_kept):
        members = tokens.features[plan.target == slot]
        expected = (start[slot] + members.sum(0)) / (len(members) + 1)
        torch.testing.assert_close(fused[slot], expected)


def test_links_are_transitive():
    # Each token is like its neighbours alone; the ends are at right angles.
    angles = torch.linspace(0, math.pi / 2, 7)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    plan = LLaVAScissor(threshold=0.95).plan(VisualTokens.from_grid(x, (1, 1, 7)))
    assert plan.num_kept == 1
    assert int(plan.sizes) == 7


def test_identical_tokens_become_one_that_is_the_same():
    x = torch.randn(1, 6).expand(24, 6)
    tokens = VisualTokens.from_grid(x, (2, 3, 4))
    out = LLaVAScissor().compress(tokens)
    assert out.plan.survivors.tolist() == [0]
    torch.testing.assert_close(out.features, x[:1])


def test_the_same_frame_again_adds_no_component():
    torch.manual_seed(3)
    frame = torch.randn(12, 16)
    once = LLaVAScissor().plan(VisualTokens.from_grid(frame, (1, 3, 4)))
    thrice = LLaVAScissor().plan(VisualTokens.from_grid(frame.repeat(3, 1), (3, 3, 4)))
    assert once.num_kept == thrice.num_kept == 12
    assert thrice.sizes.tolist() == [3] * 12


def test_zero_vectors_stay_alone():
    x = torch.randn(1, 8).expand(12, 8).clone()
    x[[2, 7]] = 0
    plan = LLaVAScissor().plan(VisualTokens.from_grid(x, (2, 2, 3)))
    assert plan.survivors.tolist() == [0, 2, 7]
    assert plan.sizes.tolist() == [10, 1, 1]


def test_the_order_of_places_changes_the_order_of_components_alone():
    tokens = tokens_of((1, 4, 5), 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = VisualTokens.from_grid(tokens.features[order], (1, 4, 5))
    strategy = LLaVAScissor(threshold=0.8)
    one, other = strategy.plan(tokens), strategy.plan(moved)
    sets = {
        frozenset((one.target == slot).nonzero().flatten().tolist()) for slot in range(one.num_kept)
    }
    again = {
        frozenset(order[(other.target == slot).nonzero().flatten()].tolist())
        for slot in range(other.num_kept)
    }
    assert sets == again


def test_chunks_change_nothing(monkeypatch):
    tokens = tokens_of((4, 4, 4), 7)
    whole = LLaVAScissor(threshold=0.7).plan(tokens)
    monkeypatch.setattr(module, "CHUNK", 50)
    parts = LLaVAScissor(threshold=0.7).plan(tokens)
    assert torch.equal(parts.target, whole.target)


@pytest.mark.parametrize("count", [1, 3, 8, 20, 40])
def test_a_budget_makes_the_strongest_links_first(count):
    tokens = tokens_of((1, 6, 8), 9)
    plan = LLaVAScissor(keep_ratio=count / 48).plan(tokens)
    assert plan.num_kept == count
    # Single linkage: no two tokens of different components are more alike than some link inside.
    x = tokens.features
    alike = similar(x, x)
    alike.fill_diagonal_(-2)
    component = plan.across.target[plan.within.target]
    apart = component[:, None] != component[None]
    for level in sorted(alike[~apart].tolist()):
        label = flood((alike >= level).tolist())
        if len(set(label)) == count:
            break
    else:
        pytest.fail("no threshold makes these components")
    same = torch.tensor(label)[:, None] == torch.tensor(label)[None]
    assert torch.equal(same, ~apart)


def members(plan):
    """The tokens of each of a plan's survivors."""
    return sorted(
        (plan.target == slot).nonzero().flatten().tolist() for slot in range(plan.num_kept)
    )


def strongest_first(x, count):
    """Tokens joined in order of falling cosine, in plain loops, until ``count`` are left."""
    alike = similar(x, x).tolist()
    pairs = sorted(((alike[a][b], a, b) for a in range(len(x)) for b in range(a)), reverse=True)
    # Rounding may tell apart links that are equal here.
    assume(len({weight for weight, _, _ in pairs}) == len(pairs))
    groups = [{i} for i in range(len(x))]
    for _, a, b in pairs:
        one, other = (next(g for g in groups if i in g) for i in (a, b))
        if len(groups) > count and one is not other:
            groups.remove(other)
            one |= other
    return sorted(sorted(g) for g in groups)


@given(GRIDS, st.integers(0, 10**6), THRESHOLDS, st.data())
def test_a_budget_links_within_frames_above_the_threshold_and_then_across(
    grid, seed, threshold, data
):
    tokens = tokens_of(grid, seed)
    n = tokens.num_tokens
    count = data.draw(st.integers(1, n - 1))
    natural = LLaVAScissor(threshold=threshold).plan(tokens).within
    plan = LLaVAScissor(threshold=threshold, keep_ratio=count / n).plan(tokens)
    assert plan.num_kept == count
    assert plan.sizes.sum() == n
    if natural.num_kept < count:
        # Fewer links than the threshold would make, all of them within frames.
        assert plan.across.is_identity
        inside = [set(group) for group in members(natural)]
        assert all(any(set(group) <= whole for whole in inside) for group in members(plan.within))
        return
    assert torch.equal(plan.within.target, natural.target)
    means = natural.fuse(tokens.features)
    assert members(plan.across) == strongest_first(means, count)


def test_of_equal_links_that_of_the_lowest_tokens_is_made_first():
    x = torch.eye(2)[[0, 1, 1, 0]]
    plan = LLaVAScissor(keep_ratio=3 / 4).plan(VisualTokens.from_grid(x, (1, 1, 4)))
    assert members(plan.within) == [[0, 3], [1], [2]]


def test_cosines_that_differ_by_side_make_no_cycle(monkeypatch):
    """A pair's two cosines may be rounded apart; every link must still join two components."""

    def round_and_round(products, roots):
        return torch.ones(3), torch.tensor([1, 2, 0])

    found, first = module._Products.strongest, iter([round_and_round])
    monkeypatch.setattr(module._Products, "strongest", lambda *args: next(first, found)(*args))
    frames = tokens_of((1, 1, 3), 0).frames.flatten(1, 2)
    weight, one, other = module._spanning_links(frames, -math.inf)
    assert weight.isfinite().sum() == 2
    assert module._join(torch.arange(3), one, other).tolist() == [0, 0, 0]


def test_cosines_that_are_held_choose_as_those_that_are_not(monkeypatch):
    tokens = tokens_of((2, 4, 6), 3)
    for options in ({"keep_ratio": 0.3}, {}):
        held = LLaVAScissor(**options).plan(tokens)
        with monkeypatch.context() as patch:
            patch.setattr(module, "CHUNK", 64)
            again = LLaVAScissor(**options).plan(tokens)
        assert torch.equal(held.target, again.target)


@pytest.mark.parametrize("n", [2, 3, 64, 577])
def test_long_chains_are_followed_to_their_ends_in_any_order(n):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    index = torch.arange(n)
    x = torch.zeros(n, n + 1).index_put((index, order), torch.ones(()))
    x = x.index_put((index, order + 1), torch.ones(()))
    plan = LLaVAScissor(threshold=0.4).plan(VisualTokens.from_grid(x, (1, 1, n)))
    assert plan.sizes.tolist() == [n]


def test_a_component_stands_at_the_member_that_is_most_like_its_token():
    angles = torch.tensor([0.0, 20, 40, 60, 80, 180]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], 1)
    plan = LLaVAScissor().plan(VisualTokens.from_grid(x, (1, 1, 6)))
    assert plan.survivors.tolist() == [2, 5]


def test_a_component_whose_mean_is_zero_still_stands_somewhere():
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    out = LLaVAScissor(threshold=-0.5).compress(VisualTokens.from_grid(x, (1, 2, 2)))
    out.plan.check(4)
    assert out.plan.survivors.tolist() == [0]
    assert out.features.isfinite().all()


@given(st.integers(1, 12), st.floats(1, 2))
def test_a_threshold_of_one_or_more_keeps_everything(n, threshold):
    tokens = VisualTokens.from_grid(torch.ones(n, 3), (1, 1, n))
    assert LLaVAScissor(threshold=threshold).plan(tokens).is_identity


def test_a_budget_joins_zero_vectors_too():
    tokens = VisualTokens.from_grid(torch.zeros(4, 2), (2, 1, 2))
    assert LLaVAScissor(threshold=-1).plan(tokens).is_identity
    out = LLaVAScissor(keep_ratio=0.5).compress(tokens)
    assert out.sizes.sum() == 4
    assert torch.equal(out.features, torch.zeros(2, 2))


def test_a_plan_fuses_other_layers_alike():
    tokens = tokens_of((3, 2, 3), 5)
    strategy = LLaVAScissor(threshold=0.8)
    out = strategy.compress(tokens)
    assert not out.plan.is_identity
    other = torch.cat([3 * tokens.features, torch.ones(18, 1)], -1)
    fused = strategy.fuse(out.plan, other)
    torch.testing.assert_close(fused[:, :-1], 3 * out.features)
    torch.testing.assert_close(fused[:, -1], torch.ones(out.plan.num_kept))


@pytest.mark.parametrize("keep_ratio", [None, 0.4])
def test_half_precision_decides_as_fp32_does(keep_ratio):
    tokens = tokens_of((3, 4, 5), 8)
    x = tokens.features.bfloat16()
    strategy = LLaVAScissor(threshold=0.8, keep_ratio=keep_ratio)
    out = strategy.compress(VisualTokens.from_grid(x, tokens.grid))
    wide = strategy.compress(VisualTokens.from_grid(x.float(), tokens.grid))
    assert torch.equal(out.plan.target, wide.plan.target)
    assert torch.equal(out.features, wide.features.bfloat16())


def test_the_preset_has_the_published_threshold():
    assert get_strategy("llava_scissor-published") == LLaVAScissor()


def test_matching_flops_are_those_of_the_first_comparison():
    assert LLaVAScissor().matching_flops((4, 3, 2), 10) == 4 * 36 * 10
