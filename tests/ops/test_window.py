import math

import pytest
import torch
from beartype import beartype
from hypothesis import assume, given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from tokenfuse.ops import window as kernel
from tokenfuse.ops.similarity import NO_MATCH, STEP

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
WINDOWS = st.sampled_from([1, 3, 5, 7])
window_match = jaxtyped(typechecker=beartype)(kernel.window_match)
SEEDS = st.integers(0, 2**32 - 1)


def cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else None


def loops(frames, reference, window):
    """The definition, one token and one candidate at a time; None where it is not clear-cut."""
    t, h, w, _ = frames.shape
    x = frames.double().tolist()
    reach = window // 2
    similarity, index = torch.empty(t, h, w), torch.empty(t, h, w, dtype=torch.long)
    for f in range(t):
        other = x[reference[f % len(reference)]]
        for i in range(h):
            for j in range(w):
                found = []
                for y in range(max(0, i - reach), min(h, i + reach + 1)):
                    for z in range(max(0, j - reach), min(w, j + reach + 1)):
                        s = cosine(x[f][i][j], other[y][z])
                        if s is not None:
                            found.append((-round(s, 9), y * w + z))
                best = min(found, default=(-NO_MATCH, i * w + j))
                if any(0 < s - best[0] < 1e-5 for s, _ in found):
                    return None
                similarity[f, i, j], index[f, i, j] = -best[0], best[1]
    return similarity, index


@st.composite
def references(draw, frames):
    size = draw(st.sampled_from([1, frames]))
    return draw(st.lists(st.integers(0, frames - 1), min_size=size, max_size=size))


def agree(frames, reference, window):
    expected = loops(frames, reference, window)
    assume(expected is not None)
    similarity, index, own = window_match(frames, torch.tensor(reference), window)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, expected[0], rtol=0, atol=2 * STEP)
    assert torch.equal(index, expected[1])
    alone = window_match(frames, torch.tensor(reference), 1)
    torch.testing.assert_close(own, alone[0], rtol=0, atol=2 * STEP)
    assert torch.equal(alone[0], alone[2])


@given(
    GRIDS, st.integers(1, 6), WINDOWS, SEEDS, st.data(), st.sampled_from(["32", "16", "b16", "64"])
)
def test_random_tokens_match_as_in_plain_loops(grid, width, window, seed, data, bits):
    dtype = {"32": torch.float32, "16": torch.float16, "b16": torch.bfloat16, "64": torch.float64}
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(*grid, width, generator=generator).to(dtype[bits])
    agree(frames, data.draw(references(grid[0])), window)


@given(GRIDS, st.integers(1, 3), WINDOWS, SEEDS, st.data())
def test_ties_go_to_the_first_in_row_major_order(grid, width, window, seed, data):
    generator = torch.Generator().manual_seed(seed)
    # So few different vectors, zero among them, that most places have several equal candidates.
    frames = torch.randint(-1, 2, (*grid, width), generator=generator).float()
    agree(frames, data.draw(references(grid[0])), window)


@given(GRIDS, st.integers(1, 300), WINDOWS, SEEDS)
def test_a_flat_picture_matches_the_first_place_of_each_window(grid, width, window, seed):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(width, generator=generator).expand(*grid, width)
    rows, columns = (torch.arange(n).sub(window // 2).clamp_min(0) for n in grid[1:])
    first = (rows[:, None] * grid[2] + columns).expand(grid)
    for reference in (torch.zeros(1, dtype=torch.long), torch.arange(grid[0])):
        similarity, index, _ = window_match(frames, reference, window)
        assert torch.equal(index, first)
        assert torch.equal(similarity, torch.ones(grid))


@given(GRIDS, WINDOWS, SEEDS, st.data())
def test_length_does_not_matter(grid, window, seed, data):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(*grid, 8, generator=generator)
    # Powers of two, so that no bit of a direction changes.
    lengths = 2.0 ** torch.randint(-20, 21, (*grid, 1), generator=generator)
    reference = torch.tensor(data.draw(references(grid[0])))
    for plain, scaled in zip(
        window_match(frames, reference, window),
        window_match(frames * lengths, reference, window),
        strict=True,
    ):
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, math.nan])
def test_a_vector_without_a_usable_length_matches_nothing(value):
    frames = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    frames[:, 1, 1] = value
    similarity, index, own = window_match(frames, torch.tensor([0]), 3)
    assert (own[:, 1, 1] == NO_MATCH).all()
    assert (similarity[:, 1, 1] == NO_MATCH).all()
    assert (index[:, 1, 1] == 4).all()
    similarity[:, 1, 1] = 0
    assert (similarity.abs() <= 1).all()
    index[:, 1, 1] = 0
    assert (index != 4).all()


def test_the_greatest_half_precision_numbers_do_not_overflow():
    frames = torch.full((2, 2, 2, 64), 65504.0, dtype=torch.float16)
    similarity, _, _ = window_match(frames, torch.tensor([0]), 3)
    assert torch.equal(similarity, torch.ones(2, 2, 2))
