import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse.errors import TokensError
from tokenfuse.tokens import VisualTokens, grid_coords

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(GRIDS)
def test_coords_count_frames_then_rows_then_columns(grid):
    assert grid_coords(grid).tolist() == [
        list(place) for place in itertools.product(*map(range, grid))
    ]


@given(GRIDS, st.integers(1, 16), DTYPES)
def test_flat_and_gridded_features_are_the_same_tokens(grid, width, dtype):
    features = torch.randn(*grid, width).to(dtype)
    gridded = VisualTokens.from_grid(features, grid)
    flat = VisualTokens.from_grid(features.flatten(0, 2), grid)
    assert gridded.num_tokens == flat.num_tokens == math.prod(grid)
    for t, h, w in flat.coords.tolist():
        index = (t * grid[1] + h) * grid[2] + w
        assert torch.equal(flat.features[index], features[t, h, w])
    assert torch.equal(gridded.features, flat.features)
    assert torch.equal(flat.frames, features)
    assert flat.frames.data_ptr() == flat.features.data_ptr(), "a view, not a copy"


@given(GRIDS, DTYPES, st.data())
def test_the_first_value_that_is_not_finite_is_named(grid, dtype, data):
    n = math.prod(grid)
    width = data.draw(st.integers(1, 5))
    places = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=3))
    features = torch.randn(n, width).to(dtype)
    values = {}
    for place in places:
        values[place] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        features[place, data.draw(st.integers(0, width - 1))] = values[place]
    first = min(places)
    t, h, w = grid_coords(grid)[first].tolist()
    kind = "NaN" if math.isnan(values[first]) else "Inf"

    with pytest.raises(TokensError) as caught:
        VisualTokens.from_grid(features, grid)
    assert f"frame {t}, row {h}, column {w};" in str(caught.value)
    assert f"features hold {kind} in {len(places)} of {n} tokens" in str(caught.value)

    unchecked = VisualTokens.from_grid(features, grid, check=False)
    with pytest.raises(TokensError):
        unchecked.check_finite()


@pytest.mark.parametrize(
    ("features", "grid", "more", "message"),
    [
        (torch.zeros(23, 4), (2, 3, 4), {}, "features has shape (23, 4)"),
        (torch.zeros(4, 6, 4), (4, 2, 3), {}, "float tensor (N, D)"),
        (torch.zeros(24), (2, 3, 4), {}, "float tensor (N, D)"),
        (torch.zeros(2, 4, 3, 8), (2, 3, 4), {}, "which is not grid (2, 3, 4)"),
        (torch.zeros(24, 4, dtype=torch.long), (2, 3, 4), {}, "torch.int64"),
        (torch.zeros(0, 4), (0, 3, 4), {}, "empty axis"),
        (torch.zeros(24, 4), (2, -3, -4), {}, "empty axis"),
        (torch.zeros(24, 4), (6, 4), {}, "expected (T, H, W)"),
        (torch.zeros(24, 4), (1, 2, 3, 4), {}, "expected (T, H, W)"),
        (torch.zeros(24, 4), (2, 3, 4), {"saliency": torch.zeros(23)}, "expected (24)"),
        (torch.zeros(24, 4), (2, 3, 4), {"saliency": torch.zeros(24, 1)}, "expected (24)"),
        (torch.zeros(24, 4), (2, 3, 4), {"text": torch.zeros(7, 5)}, "expected (n, 4)"),
    ],
)
def test_what_does_not_fit_together_is_refused(features, grid, more, message):
    with pytest.raises(TokensError) as caught:
        VisualTokens.from_grid(features, grid, **more)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.zeros(24, 2, dtype=torch.long), "coords has shape (24, 2)"),
        (torch.zeros(23, 3, dtype=torch.long), "coords has shape (23, 3)"),
        (torch.zeros(24, 3), "whole numbers"),
    ],
)
def test_coords_that_do_not_fit_are_refused(coords, message):
    with pytest.raises(TokensError) as caught:
        VisualTokens(torch.zeros(24, 4), (2, 3, 4), coords)
    assert message in str(caught.value)


def test_optional_parts_are_kept():
    more = {"saliency": torch.rand(24), "text": torch.randn(7, 4)}
    tokens = VisualTokens.from_grid(torch.zeros(24, 4), (2, 3, 4), **more)
    for name, value in more.items():
        assert getattr(tokens, name) is value


def test_tokens_are_frozen():
    tokens = VisualTokens.from_grid(torch.zeros(1, 1), (1, 1, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.grid = (1, 1, 2)


@pytest.mark.parametrize(
    ("dtype", "short"),
    [
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float32, "fp32"),
        (torch.float64, "fp64"),
    ],
)
def test_tokens_print_in_one_short_line(dtype, short):
    tokens = VisualTokens.from_grid(torch.zeros(16, 14, 14, 32, dtype=dtype), (16, 14, 14))
    assert repr(tokens) == str(tokens) == f"VisualTokens(16×14×14, D=32, {short})"
    few = tokens.after(torch.arange(74), tokens.features[:74])
    assert repr(few) == f"VisualTokens(74 of 16×14×14, D=32, {short})"


def test_tokens_say_where_they_are_unless_that_is_the_cpu():
    features = torch.zeros(24, 4, device="meta")
    tokens = VisualTokens.from_grid(features, (2, 3, 4), check=False)
    assert repr(tokens) == "VisualTokens(2×3×4, D=4, fp32, meta)"
