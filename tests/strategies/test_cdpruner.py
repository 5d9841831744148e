"""CDPruner against its definition."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenfuse.errors import TokensError
from tokenfuse.ops import CHUNK
from tokenfuse.ops.similarity import Cosines
from tokenfuse.strategies import cdpruner
from tokenfuse.strategies.cdpruner import DEPENDENT, CDPruner, greedy_map, relevance
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def kept(x, count, text, **options):
    tokens = VisualTokens.from_grid(x, (1, 1, x.shape[0]), text=text)
    plan = CDPruner(keep_ratio=count / x.shape[0], **options).plan(tokens)
    plan.check(x.shape[0])
    return plan.survivors.tolist()


def quality(x, text):
    """The published relevance, of cosines with the mean of the prompt, not negated."""
    rel = torch.cosine_similarity(x.double(), text.double().mean(0, keepdim=True))
    return (rel - rel.min() + 1e-6) / (rel.max() - rel.min())


def kernel(x, q):
    x = torch.nn.functional.normalize(x.double(), dim=1)
    return q[:, None] * (x @ x.T) * q


def brute_force(kernel, count):
    """The greedy picks by determinants computed anew."""
    picks = []
    for _ in range(count):
        rest = [j for j in range(len(kernel)) if j not in picks]
        sets = torch.tensor([[*picks, j] for j in rest])
        dets = torch.det(kernel[sets[:, :, None], sets[:, None, :]])
        best, second = dets.topk(min(2, len(rest))).values[[0, -1]].tolist()
        # Whether two that differ this little tie is a matter of rounding.
        assume(len(rest) == 1 or best - second > 1e-3 * best)
        picks.append(rest[int(dets.argmax())])
    return picks


@st.composite
def cases(draw):
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    d = draw(st.integers(4, 16))
    n = draw(st.integers(d, 24))
    x = torch.randn(n, d, generator=random) + draw(st.sampled_from([0.0, 1.0]))
    text = torch.randn(draw(st.integers(1, 5)), d, generator=random)
    return x, text, draw(st.integers(1, min(d - 1, n - 1, 6)))


@given(cases())
def test_survivors_are_the_greedy_likeliest_of_the_published_kernel(case):
    x, text, count = case
    assert kept(x, count, text) == sorted(brute_force(kernel(x, quality(x, text)), count))


@given(cases(), st.sampled_from([0.0, 0.2, 0.5, 0.8]))
def test_survivors_are_the_greedy_likeliest_of_the_weighted_kernel(case, weight):
    x, text, count = case
    q = torch.exp(weight / (2 * (1 - weight)) * quality(x, text))
    expected = sorted(brute_force(kernel(x, q), count))
    assert kept(x, count, text, relevance_weight=weight) == expected


@pytest.mark.parametrize("hold", [True, False])
@given(case=cases())
def test_the_gains_multiply_to_the_determinant_of_what_is_picked(hold, case):
    x, text, count = case
    q = relevance(Cosines(x, False).units, text)
    picks, gains = greedy_map(Cosines(x, hold), q**2, count)
    assume(bool((gains > 0).all()))
    direct = kernel(x, q.double())[picks][:, picks]
    assert len(set(picks.tolist())) == count
    assert float(gains.double().log().sum()) == pytest.approx(
        float(torch.linalg.slogdet(direct)[1]), abs=1e-2
    )


def test_one_token_is_the_most_relevant_not_the_least():
    x = noise(30)
    assert kept(x, 1, x[17:18] * 3) == [17]
    assert kept(x, 1, torch.stack([x[4] - x[9], x[9]])) == [4]


def test_relevance_is_the_cosine_with_the_mean_of_the_prompt_scaled_to_one():
    x, text = noise(30), noise(5, seed=1)
    q = relevance(Cosines(x, False).units, text)
    torch.testing.assert_close(q.double(), quality(x, text), atol=1e-4, rtol=0)
    assert q.max() == 1
    assert 0 < q.min() < 1e-5


@pytest.mark.parametrize(
    "text",
    [torch.zeros(3, 8), torch.empty(0, 8), torch.eye(8)[7:], torch.eye(8)[:1] * 0 + 1e-30],
    ids=["zero", "none", "orthogonal", "tiny"],
)
def test_a_prompt_that_says_nothing_leaves_diversity_alone(text):
    x = noise(30)
    x[:, 7] = 0
    # Computed in fp32, cosines with an orthogonal prompt are 0 exactly.
    assert kept(x, 6, text) == kept(x, 6, noise(3, seed=1), relevance_weight=0)


def test_weight_moves_the_choice_towards_the_prompt():
    x, text = noise(200, 32), noise(1, 32, seed=1)
    cosine = torch.cosine_similarity(x, text)
    means = [float(cosine[kept(x, 20, text, relevance_weight=w)].mean()) for w in (0, 0.5, 0.9)]
    assert means == sorted(means)
    assert means[2] > means[0] + 0.1


def test_beyond_what_is_independent_the_most_relevant_fill_the_budget():
    x = torch.eye(8)[[0, 0, 1, 1, 1, 2, 0]]
    text = torch.tensor([[1.0, 2.0, 3.0, 0, 0, 0, 0, 0]])
    # The first of each direction; then the other tokens along the second, then along the first.
    picks = [[5], [2, 5], [0, 2, 5], [0, 2, 3, 5], [0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    for count, expected in enumerate(picks, start=1):
        assert kept(x, count, text) == expected


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 20, 100])
def test_picks_end_where_no_token_is_independent(rank, dtype, hold):
    x = (noise(400, rank) @ noise(rank, 256, seed=1)).to(dtype)
    picks, gains = greedy_map(Cosines(x, hold), torch.ones(400), 200)
    assert len(set(picks[:rank].tolist())) == rank
    assert (gains[:rank] > DEPENDENT).all()
    assert (gains[rank:] == 0).all()
    text = noise(3, 256, seed=2)
    survivors = kept(x, 200, text)
    assert len(survivors) == 200
    # All that is kept without being independent is more relevant than all that is not kept.
    units = Cosines(x, False).units
    q = relevance(units, text)
    picks, gains = greedy_map(Cosines(x, hold), q**2, 200)
    independent = set(picks[gains > 0].tolist())
    filled = sorted(set(survivors) - independent)
    lost = sorted(set(range(400)) - set(survivors))
    assert independent <= set(survivors)
    assert q[filled].min() >= q[lost].max()


def test_identical_tokens_keep_the_lowest_indices():
    assert kept(torch.ones(9, 4), 5, torch.ones(1, 4)) == list(range(5))


def test_blank_tokens_fill_last():
    x = noise(12, 4)
    x[[0, 3, 7]] = 0
    text = noise(2, 4, seed=1)
    assert kept(x, 9, text) == [i for i in range(12) if i not in (0, 3, 7)]
    assert kept(x, 10, text) == [0, *(i for i in range(12) if i not in (0, 3, 7))]
    assert kept(torch.zeros(9, 4), 5, text) == list(range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_full_precision_keeps(dtype):
    x, text = noise(60, 32).to(dtype), noise(9, 32, seed=1).to(dtype)
    assert kept(x, 20, text) == kept(x.float(), 20, text.float())
    assert kept(x, 20, text.float()) == kept(x.float(), 20, text.float())


def test_many_tokens_are_kept_as_few_are(monkeypatch):
    x, text = noise(100, 32), noise(9, 32, seed=1)
    expected = kept(x, 25, text)
    monkeypatch.setattr(cdpruner, "CHUNK", 100)
    assert kept(x, 25, text) == expected


def test_a_prompt_is_needed():
    with pytest.raises(TokensError, match="no text"):
        kept(noise(10), 5, None)


def test_no_value_is_read_and_there_are_no_more_picks_than_dimensions():
    grid = (64, 24, 24)
    x, text = torch.empty(*grid, 16, device="meta"), torch.empty(7, 16, device="meta")
    tokens = VisualTokens.from_grid(x, grid, text=text, check=False)
    assert tokens.num_tokens**2 > CHUNK
    assert CDPruner().compress(tokens).features.shape == (3687, 16)
    picks, gains = greedy_map(Cosines(x.flatten(0, 2), False), x[..., 0].flatten(), 3687)
    assert picks.shape == gains.shape == (16,)


def test_a_weight_that_leaves_no_diversity_is_refused():
    with pytest.raises(ValidationError, match=r"less than or equal to 0\.95"):
        CDPruner(relevance_weight=1)


def test_matching_flops_are_pairs_or_rows_whichever_are_computed():
    # 100 tokens, 10 picks, all pairs at once.
    assert CDPruner().matching_flops((1, 10, 10), 8) == (4950 + 100) * 8 + 8 * 7 // 2 * 100
    # One pick, one row.
    few = CDPruner(keep_ratio=0.01).matching_flops((1, 10, 10), 8)
    assert few == (100 + 100) * 8
    n = 64 * 24 * 24
    picks = math.ceil(0.1 * n)
    long = CDPruner().matching_flops((64, 24, 24), 4096)
    assert long == (picks + 1) * n * 4096 + picks * (picks - 1) // 2 * n
