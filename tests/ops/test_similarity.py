"""The cosines that DivPrune, CDPruner and DART pick by, against their definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.ops import similarity as pairs
from tokenfuse.ops.similarity import Cosines, unit

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
