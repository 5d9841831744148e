"""Cosines against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.ops import similarity as pairs
from tokenfuse.ops.similarity import NO_MATCH, STEP, Cosines, cosine, rowwise, to_steps, unit

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def features(draw):
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(draw(st.integers(1, 20)), draw(st.integers(1, 8)), generator=random)
    x[torch.rand(x.shape[0], generator=random) < 0.2] = 0
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def definition(x):
    x = x.double()
    norm = x.norm(dim=1)
    return (x @ x.T) / (norm[:, None] * norm).clamp_min(1e-30)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(("rows", "chunk"), [(512, 2**24), (3, 2**24), (512, 40), (512, 1)])
@given(x=features())
def test_rows_and_nearest_are_the_definition(x, rows, chunk, hold):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "ROWS", rows)
        patch.setattr(pairs, "CHUNK", chunk)
        cosines = Cosines(x, hold)
        nearest = cosines.nearest()
        # After nearest, which has to leave the rows as they are.
        got = torch.stack([cosines.row(torch.tensor([i])) for i in range(x.shape[0])])
    expected = definition(x)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)
    expected.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(nearest.double(), expected.amax(1), atol=1e-6, rtol=0)


def test_what_has_no_direction_in_fp32_is_blank_and_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [3e38, 3e38], [1e-15, 0.0]])
    units, blank = unit(x)
    assert blank.tolist() == [False, True, True, True, False]
    assert units.tolist() == [pytest.approx([0.6, 0.8]), [0, 0], [0, 0], [0, 0], [1, 0]]
    assert torch.equal(unit(x.bfloat16())[1], blank)
    batched, batch_blank = unit(x.view(5, 1, 2))
    assert torch.equal(batched[:, 0], units)
    assert torch.equal(batch_blank[:, 0], blank)


@given(features(), st.sampled_from([NO_MATCH, 0.0]))
def test_row_by_row_is_the_diagonal_of_every_pair(x, blank):
    y = x.flip(0)
    expected = definition(x).flip(1).diagonal()
    exists = x.any(1) & y.any(1)
    got = rowwise(x, y, blank)
    assert got.dtype == torch.float32
    assert (got[~exists] == blank).all()
    torch.testing.assert_close(got[exists].double(), expected[exists], atol=STEP, rtol=0)
    assert torch.equal(got, cosine(x[:, None], y[:, None], blank)[:, 0, 0])
    assert torch.equal(got, to_steps(got)), "whole multiples of STEP"


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9))
def test_steps_are_the_nearest_multiples(values):
    x = torch.tensor(values)
    before = x.clone()
    rounded = to_steps(x)
    assert torch.equal(x, before), "not in place"
    assert rounded.tolist() == [round(value / STEP) * STEP for value in x.tolist()]
