"""DART against its definition."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenfuse.errors import TokensError
from tokenfuse.ops.similarity import STEP
from tokenfuse.strategies.dart import DART
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def kept(x, count, text=None, **options):
    tokens = VisualTokens.from_grid(x, (1, 1, x.shape[0]), text=text)
    plan = DART(keep_ratio=count / x.shape[0], **options).plan(tokens)
    plan.check(x.shape[0])
    return plan.survivors.tolist()


def by_norm(x):
    norms = x.double().abs().sum(1).tolist()
    for i, a in enumerate(norms):
        assume(all(a == b or abs(a - b) > 1e-4 for b in norms[:i]))
    return sorted(range(len(norms)), key=lambda i: (-norms[i], i))


def loops(x, text, count, image_pivots, text_pivots):
    """What is kept, by plain loops."""
    own = by_norm(x)[: min(image_pivots, count)]
    prompt = by_norm(text)[:text_pivots]
    pivots = torch.cat([x[own], text[prompt]]).double()
    taken, share, more = list(own), *divmod(count - len(own), len(pivots))
    for turn, pivot in enumerate(pivots):
        cosines = torch.cosine_similarity(pivot[None], x.double(), eps=1e-30)
        gaps = (cosines[:, None] - cosines).abs()
        assume(bool(((gaps < 1e-12) | (gaps > 2 * STEP)).all()))
        cosines = [round(c, 9) for c in cosines.tolist()]
        rest = sorted(set(range(len(x))) - set(taken), key=lambda i: (cosines[i], i))
        taken += rest[: share + (turn < more)]
    return sorted(taken)


@st.composite
def cases(draw):
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    n, m, d = draw(st.integers(2, 24)), draw(st.integers(0, 6)), draw(st.integers(2, 6))
    x, text = torch.randn(n, d, generator=random), torch.randn(m, d, generator=random)
    if draw(st.booleans()):
        x = torch.randint(1, 4, (n, d), generator=random).float()
    return x, text, draw(st.integers(1, n - 1)), draw(st.integers(1, 6)), draw(st.integers(0, 6))


@given(cases())
def test_survivors_are_those_of_plain_loops(case):
    x, text, count, image_pivots, text_pivots = case
    expected = loops(*case)
    assert len(expected) == count
    got = kept(x, count, text, image_pivots=image_pivots, text_pivots=text_pivots)
    assert got == expected


def test_pivots_are_kept():
    x, text = noise(50), noise(9, seed=1)
    x[[3, 40, 11, 27]] *= 10
    for count in (4, 5, 12, 49):
        assert {3, 11, 27, 40} <= set(kept(x, count, text))


def test_a_budget_below_the_pivots_keeps_those_of_greatest_norm():
    x = noise(50)
    for norm, index in enumerate([30, 7, 19, 2], start=1):
        x[index] *= 100 * norm / x[index].abs().sum()
    text = noise(9, seed=1)
    assert [kept(x, count, text) for count in (1, 2, 3)] == [[2], [2, 19], [2, 7, 19]]


def test_pivots_of_equal_norm_go_by_index():
    x = torch.eye(6).repeat(2, 1)
    assert kept(x, 3, noise(4, 6)) == [0, 1, 2]


def test_duplicates_of_a_pivot_are_the_first_to_go():
    x = noise(30)
    x[5] *= 100
    x[[8, 21, 29]] = x[5] / 100
    gone = set(range(30)) - set(kept(x, 27, image_pivots=1, text_pivots=0))
    assert gone == {8, 21, 29}


def test_tokens_least_like_the_prompt_are_kept():
    x = torch.cat([torch.eye(4)[:1] + 0.01 * noise(20, 4), torch.eye(4)[1:2] + 0.01 * noise(5, 4)])
    survivors = kept(x, 6, torch.eye(4)[:1], image_pivots=1, text_pivots=1)
    assert set(range(20, 25)) <= set(survivors)


@pytest.mark.parametrize("words", [0, 1, 3])
def test_a_short_prompt_has_fewer_pivots(words):
    x, text = noise(40), noise(words, seed=1)
    assert kept(x, 20, text) == kept(x, 20, text, text_pivots=words)


def test_without_pivots_in_the_prompt_no_prompt_is_needed():
    assert DART().needed().text
    assert not DART(text_pivots=0).needed().text
    assert len(kept(noise(10), 5, text_pivots=0)) == 5
    with pytest.raises(TokensError, match="no text"):
        kept(noise(10), 5)


def test_blank_tokens_are_taken_last():
    x = noise(20)
    x[[0, 6, 13]] = 0
    assert kept(x, 17, noise(4, seed=1)) == [i for i in range(20) if i not in (0, 6, 13)]
    assert kept(torch.zeros(10, 8), 7, torch.zeros(5, 8)) == list(range(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_full_precision_keeps(dtype):
    x, text = noise(60, 32).to(dtype), noise(9, 32, seed=1).to(dtype)
    assert kept(x, 20, text) == kept(x.float(), 20, text.float())


def test_no_value_is_read_and_no_more_than_pivots_are_compared():
    grid = (64, 24, 24)
    x, text = torch.empty(*grid, 64, device="meta"), torch.empty(7, 64, device="meta")
    tokens = VisualTokens.from_grid(x, grid, text=text, check=False)
    out = DART().compress(tokens)
    assert out.features.shape == (DART().num_kept(grid), 64) == (8184, 64)
    assert DART().matching_flops(grid, 64) == 8 * tokens.num_tokens * 64


def test_there_is_at_least_one_visual_pivot():
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        DART(image_pivots=0)
