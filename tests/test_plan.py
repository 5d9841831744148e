import itertools
import math
from dataclasses import replace

import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from tokenfuse.errors import PlanError
from tokenfuse.plan import FusionPlan

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def plans(draw, n=None, dropped=True):
    """Any valid plan, with dropped tokens unless told otherwise."""
    n = n or draw(st.integers(1, 24))
    survivors = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1)))
    slots = st.integers(-1 if dropped else 0, len(survivors) - 1)
    target = draw(st.lists(slots, min_size=n, max_size=n))
    for slot, survivor in enumerate(survivors):
        target[survivor] = slot
    return FusionPlan(torch.tensor(survivors), torch.tensor(target))


def same(a, b):
    return torch.equal(a.survivors, b.survivors) and torch.equal(a.target, b.target)


def members(plan):
    """The source tokens of each survivor."""
    target = plan.target.tolist()
    return [[i for i, slot in enumerate(target) if slot == s] for s in range(plan.num_kept)]


@given(plans())
def test_what_a_plan_says_of_itself(plan):
    plan.check(plan.num_source)
    survivors = plan.survivors.tolist()
    assert plan.num_source == len(plan.target)
    assert plan.num_kept == len(survivors)
    assert plan.keep_ratio == len(survivors) / len(plan.target)
    assert plan.sizes.tolist() == [len(m) for m in members(plan)]
    assert plan.keep_mask.tolist() == [i in survivors for i in range(plan.num_source)]
    assert plan.is_identity == (survivors == list(range(plan.num_source)))


@given(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), st.data())
def test_frame_counts(grid, data):
    plan = data.draw(plans(n=math.prod(grid)))
    frames = [place[0] for place in itertools.product(*map(range, grid))]
    expected = [0] * grid[0]
    for survivor in plan.survivors.tolist():
        expected[frames[survivor]] += 1
    assert plan.frame_counts(grid).tolist() == expected


@given(plans(), FLOATS, st.sampled_from([(), (1,), (5,), (2, 3)]))
def test_fuse_takes_the_mean_of_each_survivors_tokens(plan, dtype, shape):
    x = torch.randn(plan.num_source, *shape).to(dtype)
    expected = torch.stack([x[m].double().mean(0) for m in members(plan)])
    fused = plan.fuse(x)
    assert fused.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(fused.double(), expected, rtol=eps, atol=8 * eps)
    alone = plan.sizes == 1
    assert torch.equal(fused[alone], x[plan.survivors][alone]), "nothing to average"


@pytest.mark.parametrize(("dtype", "value"), [(torch.bfloat16, 1.0), (torch.float16, 60000.0)])
def test_the_mean_of_many_half_precision_tokens_is_not_summed_in_half_precision(dtype, value):
    many = FusionPlan(torch.tensor([0]), torch.zeros(1000, dtype=torch.long))
    x = torch.full((1000, 2), value, dtype=dtype)
    assert torch.equal(many.fuse(x), x[:1])


@given(plans(), st.sampled_from([torch.long, torch.bool, torch.float16]))
def test_select_and_keep_leave_the_survivors_rows_as_they_were(plan, dtype):
    x = torch.randint(0, 50, (plan.num_source, 3)).to(dtype)
    expected = [x[i].tolist() for i in plan.survivors.tolist()]
    assert plan.select(x).tolist() == expected
    if dtype == torch.float16:
        assert plan.fuse(x, "keep").tolist() == expected


@given(plans())
def test_expand_gives_each_token_its_survivors_row_and_dropped_ones_zero(plan):
    y = torch.randn(plan.num_kept, 2, 3)
    full = plan.expand(y)
    for i, slot in enumerate(plan.target.tolist()):
        assert torch.equal(full[i], torch.zeros(2, 3) if slot < 0 else y[slot])
    assert torch.equal(plan.select(full), y)


@given(plans())
def test_dropped_tokens_touch_nothing(plan):
    x = torch.randn(plan.num_source, 3)
    expected = plan.fuse(x)
    x[plan.target < 0] = math.nan
    assert torch.equal(plan.fuse(x), expected)


@given(plans(), st.data())
def test_compose_is_one_plan_after_the_other(plan, data):
    then = data.draw(plans(n=plan.num_kept))
    both = plan.compose(then)
    both.check(plan.num_source)
    x = torch.randn(plan.num_source, 3)
    assert torch.equal(both.select(x), then.select(plan.select(x)))
    y = torch.randn(then.num_kept, 3)
    assert torch.equal(both.expand(y), plan.expand(then.expand(y)))
    sizes = [sum(plan.sizes[i].item() for i in m) for m in members(then)]
    assert both.sizes.tolist() == sizes


@given(plans(), st.data())
def test_compose_is_associative(first, data):
    second = data.draw(plans(n=first.num_kept))
    third = data.draw(plans(n=second.num_kept))
    assert same(first.compose(second).compose(third), first.compose(second.compose(third)))


@given(plans())
def test_composing_with_the_identity_changes_nothing(plan):
    assert same(plan.compose(FusionPlan.identity(plan.num_kept)), plan)
    assert same(FusionPlan.identity(plan.num_source).compose(plan), plan)


@given(st.integers(1, 30), FLOATS)
def test_the_identity_changes_nothing(n, dtype):
    plan = FusionPlan.identity(n)
    plan.check(n)
    assert plan.is_identity
    assert plan.keep_ratio == 1.0
    x = torch.randn(n, 3).to(dtype)
    for unchanged in (plan.select(x), plan.fuse(x), plan.fuse(x, "keep"), plan.expand(x)):
        assert torch.equal(unchanged, x)


@given(plans())
def test_from_survivors_drops_the_rest(plan):
    made = FusionPlan.from_survivors(plan.survivors, plan.num_source)
    made.check(plan.num_source)
    survivors = plan.survivors.tolist()
    assert made.target.tolist() == [
        survivors.index(i) if i in survivors else -1 for i in range(plan.num_source)
    ]


@given(plans())
def test_from_roots_finds_the_slots_and_drops_what_has_no_root(plan):
    roots = torch.where(plan.target < 0, -1, plan.survivors[plan.target])
    assert same(FusionPlan.from_roots(plan.survivors, roots), plan)


@given(plans(), st.integers(1, 3))
def test_rows_that_are_not_the_plans_are_refused(plan, extra):
    long = torch.zeros(plan.num_source + extra, 2)
    for apply in (plan.select, plan.fuse, lambda x: plan.fuse(x, "keep")):
        with pytest.raises(PlanError, match=f"expected {plan.num_source} rows"):
            apply(long)
    with pytest.raises(PlanError, match=f"expected {plan.num_kept} rows"):
        plan.expand(torch.zeros(plan.num_kept + extra, 2))
    with pytest.raises(PlanError, match=f"the first leaves {plan.num_kept}"):
        plan.compose(FusionPlan.identity(plan.num_kept + extra))


@pytest.mark.parametrize(
    ("survivors", "target", "message"),
    [
        ([0, 4], [0, 0, 0, 0], "survivors must lie in 0..N-1"),
        ([-1, 0], [1, 0, 0, 0], "survivors must lie in 0..N-1"),
        ([2, 0], [1, 0, 0, 0], "survivors must be strictly increasing"),
        ([1, 1], [0, 0, 0, 0], "survivors must be strictly increasing"),
        ([0, 2], [0, 2, 1, 1], "targets must lie in -1..M-1"),
        ([0, 2], [0, -2, 1, 1], "targets must lie in -1..M-1"),
        ([0, 2], [0, 0, 0, 1], "each survivor must be its own target"),
        ([0, 2], [0, 0, -1, 1], "each survivor must be its own target"),
        ([], [-1, -1, -1, -1], "keeps no token"),
        ([0], [0, 0, 0], "expected (M,) and (4,)"),
        ([[0]], [0, 0, 0, 0], "expected (M,) and (4,)"),
        ([0], [[0], [0], [0], [0]], "expected (M,) and (4,)"),
    ],
)
def test_check_refuses_each_broken_plan_by_its_rule(survivors, target, message):
    plan = FusionPlan(torch.tensor(survivors, dtype=torch.long), torch.tensor(target))
    with pytest.raises(PlanError) as caught:
        plan.check(4)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32])
def test_check_refuses_indices_that_are_not_long(dtype):
    index = torch.arange(2)
    for plan in (FusionPlan(index.to(dtype), index), FusionPlan(index, index.to(dtype))):
        with pytest.raises(PlanError, match=r"expected torch\.long"):
            plan.check(2)


CHECKED = {
    name: jaxtyped(typechecker=beartype)(method)
    for name, method in {
        "fuse": FusionPlan.fuse,
        "from_survivors": FusionPlan.from_survivors.__func__,
        "from_roots": FusionPlan.from_roots.__func__,
        "frame_counts": FusionPlan.frame_counts,
        "sizes": FusionPlan.sizes.fget,
        "keep_mask": FusionPlan.keep_mask.fget,
    }.items()
}


@given(plans(dropped=False))
def test_the_annotated_shapes_hold(plan):
    n, survivors = plan.num_source, plan.survivors
    CHECKED["fuse"](plan, torch.zeros(n, 3))
    CHECKED["from_survivors"](FusionPlan, survivors, n)
    CHECKED["from_roots"](FusionPlan, survivors, survivors[plan.target])
    CHECKED["frame_counts"](plan, (n, 1, 1))
    CHECKED["sizes"](plan)
    CHECKED["keep_mask"](plan)


def test_a_plan_prints_in_one_short_line():
    plan = FusionPlan.from_survivors(torch.arange(74), 288)
    assert repr(plan) == str(plan) == "FusionPlan(74 of 288 kept)"


# --- frames in another order --------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_whole_frames_stand_in_the_order_of_the_plan(frames, places, data):
    plan = data.draw(plans(n=frames * places))
    order = data.draw(st.permutations(range(frames)))
    moved = replace(plan, frame_order=torch.tensor(order))
    moved.check(frames * places, frames)
    frame = plan.survivors // places
    slots = moved.prompt_order(frame).tolist()
    expected = [s for f in order for s in range(plan.num_kept) if int(frame[s]) == f]
    assert slots == expected
    assert plan.prompt_order(frame).tolist() == list(range(plan.num_kept))
    # Nothing else looks at the order.
    assert not moved.is_identity
    x = torch.randn(frames * places, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(moved.select(x), plan.select(x))
    torch.testing.assert_close(moved.fuse(x), plan.fuse(x))


@given(plans())
def test_the_later_of_two_plans_has_the_say_about_the_order(plan):
    first, second = torch.tensor([1, 0]), torch.tensor([0, 1])
    then = FusionPlan.identity(plan.num_kept)
    ordered = replace(plan, frame_order=first)
    assert plan.compose(then).frame_order is None
    assert ordered.compose(then).frame_order is first
    assert ordered.compose(replace(then, frame_order=second)).frame_order is second


@pytest.mark.parametrize(
    ("order", "frames"),
    [
        (torch.tensor([0, 0]), None),
        (torch.tensor([1, 2]), None),
        (torch.tensor([0, 1, 2]), 2),
        (torch.tensor([0]), 2),
        (torch.tensor([[0, 1]]), None),
        (torch.tensor([0, 1], dtype=torch.int32), 2),
    ],
)
def test_an_order_that_is_none_is_refused(order, frames):
    plan = replace(FusionPlan.identity(4), frame_order=order)
    with pytest.raises(PlanError, match=r"frame_order .* expected every frame once"):
        plan.check(4, frames)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2, 3, 100])
def test_a_mean_of_the_largest_numbers_is_one_of_them(dtype, n):
    plan = FusionPlan.from_roots(torch.tensor([0]), torch.zeros(n, dtype=torch.long))
    for value in (torch.finfo(dtype).max, -torch.finfo(dtype).max):
        x = torch.full((n, 3), value, dtype=dtype)
        assert torch.equal(plan.fuse(x), x[:1])
        assert torch.equal(plan.absorbed(x), x[:1])
