"""The reconstruction of MaMe against its own definition; there is nothing else to compare with."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.config import get_strategy
from tokenfuse.strategies.mame import MaMe, SoftPlan
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32)


def row(x):
    x = torch.as_tensor(x)
    return VisualTokens.from_grid(x, (1, 1, len(x)))


def some(n, seed, width=4):
    random = torch.Generator().manual_seed(seed)
    return row(torch.randn(n, width, generator=random))


def near(angles):
    """Tokens of length 1 at these angles in degrees."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return row(torch.stack([radians.cos(), radians.sin()], -1).float())


def dense(x, threshold):
    """Destinations, merged sources and the whole matrix of weights by the definition, in fp64."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    similar = (x[::2] @ x[1::2].T).mul(2**17).round().div(2**17)
    weight = (similar - threshold).clamp_min(0)
    mean = weight.sum(0) / (weight > 0).sum(0).clamp_min(1)
    weight = weight * (weight >= mean - 1e-12)
    return weight / weight.sum(0).clamp_min(1e-300)


@given(st.integers(2, 20), st.sampled_from([-1.0, 0.0, 0.4, 0.8]), SEEDS)
def test_one_round_is_the_matrix_product_of_the_definition(n, threshold, seed):
    tokens = some(n, seed)
    x = tokens.features.double()
    weight = dense(x, threshold)
    merged = weight.sum(0) > 0
    expected = x.clone()
    expected[::2] = (x[::2] + weight @ x[1::2]) / (1 + weight.sum(1, keepdim=True))
    stays = torch.ones(n, dtype=torch.bool)
    stays[1::2] = ~merged
    out = MaMe(threshold=threshold).compress(tokens)
    out.plan.check(n)
    assert out.plan.survivors.tolist() == stays.nonzero().flatten().tolist()
    torch.testing.assert_close(out.features.double(), expected[stays], rtol=1e-4, atol=1e-4)
    for j in merged.nonzero().flatten().tolist():
        root = out.plan.survivors[out.plan.target[2 * j + 1]]
        assert weight[root // 2, j] == pytest.approx(weight[:, j].max())


@given(st.integers(2, 24), st.data(), SEEDS)
def test_what_tokens_stand_for_times_their_features_is_conserved(n, data, seed):
    tokens = some(n, seed)
    keep_ratio = data.draw(st.none() | st.integers(1, n - 1).map(lambda k: k / n))
    plan = MaMe(threshold=0.3, keep_ratio=keep_ratio).plan(tokens)
    assert isinstance(plan, SoftPlan)
    y, mass = plan.merged(tokens.features)
    assert mass.sum() == pytest.approx(n, rel=1e-5)
    total = (mass[:, None] * y).sum(0)
    torch.testing.assert_close(total, tokens.features.sum(0), rtol=1e-4, atol=1e-4)


@given(st.integers(2, 24), st.sampled_from([-1.0, 0.3, 0.8, 1.0]), st.data(), SEEDS)
def test_the_shares_of_every_merged_token_sum_to_one(n, threshold, data, seed):
    keep_ratio = data.draw(st.integers(1, n - 1)) / n
    tokens = some(n, seed)
    for step in MaMe(threshold=threshold, keep_ratio=keep_ratio).plan(tokens).rounds:
        for part, share in step.weights():
            assert (share >= 0).all()
            torch.testing.assert_close(share.sum(-1), torch.ones(len(part)))


def test_an_only_neighbour_takes_the_whole_source():
    out = MaMe(threshold=0.9).compress(near([0, 5, 90, 170]))
    assert out.plan.target.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(out.features, near([2.5, 90, 170]).features, atol=5e-3, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 5, 7, 10, 300])
def test_equal_neighbours_share_equally(k):
    x = torch.zeros(2 * k, 3)
    x[::2, 0] = 1
    x[1] = torch.tensor([0.9, 0.3, 0.1])
    x[3::2, 1] = 1
    plan = MaMe(threshold=0.5).plan(row(x))
    assert plan.num_kept == 2 * k - 1
    ((_, share),) = plan.rounds[0].weights()
    torch.testing.assert_close(share, torch.full((1, k), 1 / k))
    assert plan.target[1] == 0


def test_links_below_the_mean_are_cut():
    # Cosines of 1, .985 and .866 with the source; the mean is .950.
    ((_, share),) = MaMe(threshold=0.8).plan(near([10, 10, 0, 100, 40])).rounds[0].weights()
    a, b = 0.2, math.cos(math.radians(10)) - 0.8
    torch.testing.assert_close(share, torch.tensor([[a, b, 0]]) / (a + b), rtol=1e-3, atol=0)


@given(st.integers(1, 20), st.floats(1, 3))
def test_a_threshold_of_one_or_more_keeps_everything(n, threshold):
    assert MaMe(threshold=threshold).plan(row(torch.ones(n, 3))).is_identity


def test_sources_without_a_neighbour_stay_to_the_bit_and_so_do_zeros():
    tokens = row([[1.0, 0], [0, 3.3], [1.1, 0], [0, 0], [0, 0], [0.7, 0.01]])
    out = MaMe().compress(tokens)
    assert out.plan.survivors.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(out.features[1], tokens.features[1])
    assert torch.equal(out.features[3:], torch.zeros(2, 2))


def test_zeros_have_no_share_however_low_the_threshold():
    x = torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 0], [0, 3], [1, 1]])
    plan = MaMe(threshold=-1).plan(row(x))
    assert plan.survivors.tolist() == [0, 2, 3, 4]
    ((_, share),) = plan.rounds[0].weights()
    torch.testing.assert_close(share, torch.tensor([[0, 1.0, 0], [0, 0.5, 0.5]]))


@given(st.integers(2, 20), st.data(), SEEDS)
def test_a_budget_merges_the_most_similar_sources_first(n, data, seed):
    tokens = some(n, seed)
    gone = data.draw(st.integers(1, n // 2))
    plan = MaMe(keep_ratio=(n - gone) / n).plan(tokens)
    assert plan.num_kept == n - gone
    x = torch.nn.functional.normalize(tokens.features.double(), dim=-1)
    best = (x[1::2] @ x[::2].T).amax(-1)
    order = best.argsort(descending=True)[:gone]
    lost = set(range(n)) - set(plan.survivors.tolist())
    assert lost == {2 * j + 1 for j in order.tolist()}


@given(st.integers(1, 40), st.data(), st.sampled_from(["some", "same", "zero"]))
def test_rounds_reach_every_count(n, data, kind):
    count = data.draw(st.integers(1, n))
    x = some(n, 0).features
    x = {"some": x, "same": x[:1].expand_as(x).contiguous(), "zero": 0 * x}[kind]
    out = MaMe(keep_ratio=count / n).compress(row(x))
    out.plan.check(n)
    assert out.plan.num_kept == count
    assert out.sizes.sum() == n
    assert out.features.isfinite().all()
    if kind == "same":
        torch.testing.assert_close(out.features, x[:count])


def test_a_plan_fuses_other_layers_by_the_weights_of_the_features():
    tokens = some(16, 3)
    config = MaMe(keep_ratio=0.2)
    out = config.compress(tokens)
    other = torch.cat([2 * tokens.features, torch.ones(16, 1)], -1)
    fused = config.fuse(out.plan, other)
    torch.testing.assert_close(fused[:, :-1], 2 * out.features)
    torch.testing.assert_close(fused[:, -1], torch.ones(out.plan.num_kept))


def test_the_gradient_is_finite_and_passes_through_the_features_only():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    x[4] = 0
    x.requires_grad_()
    MaMe(threshold=0.2).compress(row(x)).features.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_half_precision_decides_as_fp32_does():
    x = some(32, 1).features.bfloat16()
    config = MaMe(keep_ratio=0.6)
    out, wide = config.compress(row(x)), config.compress(row(x.float()))
    assert torch.equal(out.plan.target, wide.plan.target)
    assert torch.equal(out.features, wide.features.bfloat16())


@pytest.mark.parametrize("keep_ratio", [0.1, 0.5, 0.9])
def test_a_budget_reads_no_value(keep_ratio):
    x = torch.empty(40, 8, device="meta")
    tokens = VisualTokens.from_grid(x, (4, 2, 5), check=False)
    assert MaMe(keep_ratio=keep_ratio).compress(tokens).features.shape == (40 * keep_ratio, 8)


def test_weights_are_the_same_in_parts(monkeypatch):
    tokens = some(40, 2)
    config = MaMe(threshold=0.1)
    expected = config.compress(tokens).features
    monkeypatch.setattr(importlib.import_module("tokenfuse.strategies.mame"), "CHUNK", 4 * 60)
    torch.testing.assert_close(config.compress(tokens).features, expected)


def test_it_is_experimental_and_the_preset_has_the_published_threshold():
    assert MaMe.experimental
    assert get_strategy("mame-published") == MaMe()


def test_matching_flops_are_those_of_the_rounds():
    assert MaMe().matching_flops((1, 3, 3), 10) == 4 * 5 * 10
    assert MaMe(threshold=1).matching_flops((1, 3, 3), 10) == 0
    assert MaMe(keep_ratio=2 / 9).matching_flops((1, 3, 3), 10) == (4 * 5 + 2 * 3 + 1 * 2) * 10
