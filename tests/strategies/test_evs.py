"""EVS against its definition and against the published selection."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tokenfuse.strategies.evs import EVS
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)
GRIDS = st.tuples(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4))


def noise(grid, seed=0, width=8):
    return torch.randn(*grid, width, generator=torch.Generator().manual_seed(seed))


def plan_of(x, keep_ratio):
    return EVS(keep_ratio=keep_ratio).plan(VisualTokens.from_grid(x, tuple(x.shape[:3])))


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_the_mask_is_the_published_one(case):
    with safe_open(Path(__file__).parents[1] / "data/evs.safetensors", "pt") as file:
        given_ = json.loads(file.metadata()[case])
        x, mask = file.get_tensor(f"{case}.features"), file.get_tensor(f"{case}.mask")
    tokens = VisualTokens.from_grid(x, tuple(given_["grid"]))
    plan = EVS(keep_ratio=1 - given_["pruning_rate"]).plan(tokens)
    assert torch.equal(plan.keep_mask, mask)


@given(GRIDS, SEEDS, st.data())
def test_survivors_are_the_first_frame_and_the_greatest_changes(grid, seed, data):
    n, places = math.prod(grid), grid[1] * grid[2]
    count = data.draw(st.integers(1, n))
    x = noise(grid, seed)
    rows = x.flatten(0, 2).double()
    change = [math.inf] * places + [
        1 - torch.cosine_similarity(rows[i], rows[i - places], dim=0).item()
        for i in range(places, n)
    ]
    expected = sorted(range(n), key=lambda i: (-change[i], i))[:count]
    assert plan_of(x, count / n).survivors.tolist() == sorted(expected)


@given(GRIDS, SEEDS, st.integers(1, 1000))
def test_the_count_does_not_depend_on_the_content(grid, seed, thousandths):
    config = EVS(keep_ratio=thousandths / 1000)
    for x in (noise(grid, seed), torch.ones(*grid, 4), torch.zeros(*grid, 4)):
        plan = config.plan(VisualTokens.from_grid(x, grid))
        plan.check(math.prod(grid))
        assert plan.num_kept == config.num_kept(grid)


@given(SEEDS, st.integers(6, 24))
def test_the_first_frame_stays_whole_where_the_budget_holds_it(seed, count):
    assert plan_of(noise((4, 2, 3), seed), count / 24).survivors[:6].tolist() == [*range(6)]


@given(st.integers(1, 24), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_still_video_keeps_its_first_frame_and_then_its_lowest_indices(count, dtype):
    still = noise((1, 2, 3)).to(dtype).expand(4, -1, -1, -1).contiguous()
    assert plan_of(still, count / 24).survivors.tolist() == [*range(count)]


def test_a_token_is_compared_with_the_frame_before_even_where_that_was_dropped():
    # It turns by 30 degrees a frame, a second one jumps once and stays.
    angle = torch.arange(5) * math.pi / 6
    turning = torch.stack([angle.cos(), angle.sin()], -1)
    jumping = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1], [0, 1]])
    x = torch.stack([turning, jumping], 1).view(5, 1, 2, 2)
    # Against the last survivor the turn would add up and beat what stays.
    assert plan_of(x, 3 / 10).survivors.tolist() == [0, 1, 3]
    assert plan_of(x, 7 / 10).survivors.tolist() == [0, 1, 2, 3, 4, 6, 8]


def test_a_zero_vector_is_at_right_angles_to_everything():
    x = torch.tensor([[1.0, 0], [0, 0], [-1, 0], [-1, 0.1]]).view(4, 1, 1, 2)
    # Changes: the first, 1, 1, almost 0.
    assert plan_of(x, 0.5).survivors.tolist() == [0, 1]
    assert plan_of(x, 0.75).survivors.tolist() == [0, 1, 2]


@given(st.integers(1, 1000))
def test_an_image_stays_as_it_is(thousandths):
    assert plan_of(noise((1, 2, 3)), thousandths / 1000).is_identity


def test_it_never_reads_a_value_and_counts_its_comparisons():
    tokens = VisualTokens.from_grid(torch.empty(4, 2, 3, 8, device="meta"), (4, 2, 3), check=False)
    assert EVS().plan(tokens).survivors.shape == (6,)
    assert EVS().matching_flops((4, 2, 3), 8) == 3 * 6 * 8
