"""Whether values are finite."""

import pytest
import torch

from tokenfuse.tokens import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype):
    # Sums of values as large as these would not be finite.
    x = torch.full((37, 53), torch.finfo(dtype).max, dtype=dtype)
    x[::2] *= -1
    assert bool(all_finite(x))
    for place in (0, 1, 991, x.numel() - 1):
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = x.clone()
            bad.view(-1)[place] = value
            assert not bool(all_finite(bad))


def test_nothing_is_finite():
    assert bool(all_finite(torch.empty(0, 4)))
