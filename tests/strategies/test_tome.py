import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tokenfuse import VisualTokens, get_strategy
from tokenfuse.errors import ConfigError
from tokenfuse.ops import similarity
from tokenfuse.ops.matching import bipartite_soft_matching, weighted_mean

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = Path(__file__).parents[1] / "data" / "tome.safetensors"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def item(features, grid=None):
    return VisualTokens.from_grid(features, grid or (1, 1, len(features)))


def roots(plan):
    """The survivor of each token, as a source index."""
    return plan.survivors[plan.target].tolist()


def matched_by_hand(metric, r, protected):
    """The root of each token, from the definition, one pair at a time."""
    n = len(metric)
    root = list(range(n))
    units = torch.nn.functional.normalize(metric.double(), dim=-1)
    edges = []
    for a in range(0, n, 2):
        others = [b for b in range(1, n, 2) if b >= protected]
        if a < protected or not others:
            continue
        similar = [float(units[a] @ units[b]) for b in others]
        edges.append((-max(similar), a, others[similar.index(max(similar))]))
    for _, a, b in sorted(edges)[: max(0, min(r, (n - protected) // 2))]:
        root[a] = b
    return root


# The matching


@pytest.mark.parametrize("case", range(4))
def test_groups_and_means_are_those_of_the_published_code(case):
    with safe_open(VECTORS, "pt") as file:
        given = json.loads(file.metadata()[f"case{case}"])
        names = ("features", "metric", "size", "merged", "merged_size", "row_of_token")
        x, metric, size, merged, merged_size, rows = (
            file.get_tensor(f"case{case}.{name}") for name in names
        )
    batch, n = rows.shape
    plan = bipartite_soft_matching(metric, given["r"], int(given["class_token"]))
    plan.check(batch * n)
    own = plan.target.view(batch, n)
    assert torch.equal(own[:, :, None] == own[:, None], rows[:, :, None] == rows[:, None])
    mean = weighted_mean(plan, x.flatten(0, 1), size.flatten())[own]
    expected = merged.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    total = size.flatten().new_zeros(plan.num_kept).index_add(0, plan.target, size.flatten())
    torch.testing.assert_close(total[own], merged_size.squeeze(-1).gather(1, rows))


@given(st.integers(1, 24), st.integers(0, 12), st.integers(0, 6), st.integers(0, 1000))
def test_the_matching_is_the_definition(n, r, protected, seed):
    metric = randn(n, 4, seed=seed)
    plan = bipartite_soft_matching(metric, r, min(protected, n))
    assert roots(plan) == matched_by_hand(metric, r, min(protected, n))


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 6))
def test_a_round_removes_r_but_no_more_than_half_of_what_may_merge(n, r, protected):
    plan = bipartite_soft_matching(torch.ones(n, 2), r, protected)
    plan.check(n)
    assert plan.num_kept == n - min(r, max(0, n - protected) // 2)


@pytest.mark.parametrize("protected", [1, 2, 3, 5])
def test_protected_tokens_neither_merge_nor_absorb(protected):
    # All alike, so that every token would merge with a protected one if it could.
    plan = bipartite_soft_matching(torch.ones(12, 4), 12, protected)
    assert roots(plan)[:protected] == list(range(protected))
    assert plan.sizes[:protected].tolist() == [1] * protected


def test_a_batch_is_matched_as_its_samples_are():
    metric = randn(3, 17, 4)
    plan = bipartite_soft_matching(metric, 6, 1)
    for i, one in enumerate(metric):
        alone = bipartite_soft_matching(one, 6, 1)
        assert torch.equal(plan.target[i * 17 : (i + 1) * 17] - 11 * i, alone.target)
        assert torch.equal(plan.survivors[i * 11 : (i + 1) * 11] - 17 * i, alone.survivors)


def test_equal_tokens_merge_from_the_first_into_the_first():
    plan = bipartite_soft_matching(randn(1, 5).expand(999, -1), 3)
    assert roots(plan) == [1, 1, 1, 3, 1, *range(5, 999)]


def test_a_zero_key_merges_last_and_is_nobodys_match():
    metric = randn(8, 4).abs()
    metric[[2, 5]] = 0
    plan = bipartite_soft_matching(metric, 3)
    assert roots(plan)[2] == 2
    assert plan.sizes[plan.target[5]] == 1
    assert bipartite_soft_matching(torch.zeros(8, 4), 4).num_kept == 4


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_merges_the_same_tokens(kind):
    # Far apart: each even token is near one odd one, and the noise is below the gaps.
    metric = torch.eye(16).repeat_interleave(2, 0)
    metric[::2] += torch.linspace(0.1, 0.8, 16)[:, None] * torch.eye(16).roll(1, 0)
    full = bipartite_soft_matching(metric, 8)
    assert roots(bipartite_soft_matching(metric.to(kind), 8)) == roots(full)


def test_chunks_do_not_change_the_matching(monkeypatch):
    metric = randn(2, 40, 4)
    whole = bipartite_soft_matching(metric, 12)
    monkeypatch.setattr(similarity, "CHUNK", 64 * 80)
    assert torch.equal(bipartite_soft_matching(metric, 12).target, whole.target)


@given(st.integers(2, 20), st.integers(1, 10), st.integers(0, 100))
def test_merging_conserves_the_weighted_sum(n, r, seed):
    x, sizes = randn(n, 3, seed=seed), torch.randint(1, 9, (n,))
    plan = bipartite_soft_matching(x, r)
    total = torch.zeros(plan.num_kept).index_add(0, plan.target, sizes.float())
    mean = weighted_mean(plan, x, sizes)
    torch.testing.assert_close(
        (mean * total[:, None]).sum(0), (x * sizes[:, None]).sum(0), atol=1e-4, rtol=1e-4
    )
    alone = plan.sizes == 1
    assert torch.equal(mean[alone], x[plan.survivors][alone])


# Before an LLM


def test_half_the_budget_is_one_round():
    x = randn(24, 6)
    plan = get_strategy("tome", keep_ratio=0.5).plan(item(x))
    assert roots(plan) == matched_by_hand(x, 12, 0)


def test_later_rounds_compare_means_weighted_by_size():
    x = randn(20, 4, seed=3)
    plan = get_strategy("tome", keep_ratio=0.3).plan(item(x))
    first = matched_by_hand(x, 10, 0)
    left = sorted(set(first))
    means = torch.stack([x[[i for i in range(20) if first[i] == s]].mean(0) for s in left])
    second = matched_by_hand(means, 4, 0)
    assert roots(plan) == [left[second[left.index(i)]] for i in first]


def test_survivors_are_the_mean_of_all_that_they_stand_for():
    x = randn(30, 4)
    short = get_strategy("tome", keep_ratio=0.1).compress(item(x, (2, 3, 5)))
    assert short.sizes.sum() == 30
    for slot, row in enumerate(short.features):
        torch.testing.assert_close(row, x[short.plan.target == slot].mean(0))


@given(st.integers(1, 40), st.data())
def test_every_count_can_be_met(n, data):
    kept = data.draw(st.integers(1, n))
    plan = get_strategy("tome", keep_ratio=kept / n).plan(item(torch.ones(n, 2)))
    plan.check(n)
    assert plan.num_kept == kept


@pytest.mark.parametrize(("keep", "pairs"), [(1.0, 0), (0.5, 8 * 8), (0.25, 64 + 16)])
def test_flops_count_the_pairs_compared(keep, pairs):
    assert get_strategy("tome", keep_ratio=keep).matching_flops((1, 4, 4), 10) == pairs * 10


# Tokens merged per block


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": 8}, [8, 8, 8, 8]),
        ({"r": 8, "inflection": -1}, [16, 10, 5, 0]),
        ({"r": 8, "inflection": 1}, [0, 5, 10, 16]),
        ({"r": 8, "inflection": -0.5}, [12, 9, 6, 4]),
        ({"r": [3, 1]}, [3, 1, 0, 0]),
        ({"r": [1, 2, 3, 4, 5]}, [1, 2, 3, 4]),
        ({"r": 0}, [0, 0, 0, 0]),
        ({"keep_ratio": 0.5}, [2, 3, 2, 3]),
    ],
)
def test_tokens_merged_per_block(options, expected):
    assert get_strategy("tome", **options).merges(4, 20) == expected


def test_the_decreasing_schedule_is_the_published_one():
    assert sum(get_strategy("tome", r=16, inflection=-1).merges(12, 196)) == 187


def test_one_block_has_a_schedule_too():
    assert get_strategy("tome", r=4, inflection=-1).merges(1, 50) == [8]


@pytest.mark.parametrize("r", [None, [4, 4]])
def test_inflection_needs_one_r(r):
    with pytest.raises(ConfigError, match="give r as one whole number"):
        get_strategy("tome", r=r, inflection=-1)


@pytest.mark.parametrize("r", [-1, 1.5, [2, -1], "8"])
def test_r_is_a_whole_number_or_a_list_of_them(r):
    with pytest.raises(ConfigError, match="r: "):
        get_strategy("tome", r=r)


def test_a_number_per_block_is_refused_where_there_are_no_blocks():
    tokens = VisualTokens.from_grid(torch.randn(12, 4), (3, 2, 2))
    with pytest.raises(ConfigError, match="r: 8 counts tokens per block"):
        get_strategy("tome", r=8).plan(tokens)
