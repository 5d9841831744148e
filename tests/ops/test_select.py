import math
from fractions import Fraction

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from tokenfuse.ops import select
from tokenfuse.ops.select import budget

pytestmark = pytest.mark.usefixtures("one_thread")

checked = jaxtyped(typechecker=beartype)
true_indices = checked(select.true_indices)


@given(st.integers(1, 1000), st.integers(1, 100_000))
def test_budget_is_the_ceiling_of_the_decimal_that_was_written(thousandths, n):
    ratio = thousandths / 1000
    assert budget(ratio, n) == math.ceil(Fraction(thousandths, 1000) * n)


@given(st.integers(1, 100_000), st.data())
def test_budget_of_a_share_is_that_share(n, data):
    kept = data.draw(st.integers(1, n))
    assert budget(kept / n, n) == kept


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 100_000))
def test_budget_keeps_at_least_one_and_at_most_all(ratio, n):
    assert 1 <= budget(ratio, n) <= n
    assert budget(1.0, n) == n


@given(st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=1, max_size=5))
def test_torch_chooses_the_lowest_of_equals(rows):
    greatest, least = ([row.index(f(row)) for row in rows] for f in (max, min))
    for dtype in (torch.long, torch.float32):
        x = torch.tensor(rows, dtype=dtype)
        assert x.argmax(-1).tolist() == x.max(-1).indices.tolist() == greatest
        assert x.argmin(-1).tolist() == least
    nothing = torch.full((3,), -math.inf)
    assert nothing.argmax(-1).item() == nothing.max(-1).indices.item() == 0


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_true_indices_are_ascending(flags):
    expected = [i for i, flag in enumerate(flags) if flag]
    assert true_indices(torch.tensor(flags), len(expected)).tolist() == expected
