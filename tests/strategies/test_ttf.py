"""TTF against its definition (docs/explanation/ttf.md and the docstring of TTF).

Hypothesis draws shapes, options and a seed; torch draws the numbers from the seed.
"""

import itertools
import math
import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tokenfuse.errors import ConfigError
from tokenfuse.ops import window
from tokenfuse.plan import FusionPlan
from tokenfuse.strategies import ttf
from tokenfuse.strategies.ttf import REANCHOR_ROUNDS, TTF
from tokenfuse.tokens import VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = st.integers(0, 2**32 - 1)


def grids(t=6, h=4, w=7):
    return st.tuples(st.integers(1, t), st.integers(1, h), st.integers(1, w))


@st.composite
def videos(draw, grid, widths=(1, 2, 3, 8, 16), dtypes=tuple(DTYPES)):
    """Features ``(T, H, W, D)``: noise, a few scenes with some noise, or few different vectors."""
    width, dtype = draw(st.sampled_from(widths)), draw(st.sampled_from(dtypes))
    random = torch.Generator().manual_seed(draw(SEEDS))
    kind = draw(st.sampled_from(["noise", "scenes", "letters"]))
    if kind == "letters":
        return torch.randint(-1, 3, (*grid, width), generator=random).to(dtype)
    noise = torch.randn(*grid, width, generator=random)
    if kind == "noise":
        return noise.to(dtype)
    scenes = torch.randn(3, *grid[1:], width, generator=random)
    cuts = torch.rand(grid[0], generator=random) < 0.3
    x = scenes[cuts.cumsum(0) % 3] + 0.3 * noise
    x[torch.rand(grid, generator=random) < 0.05] = 0
    return x.to(dtype)


@st.composite
def configs(draw, grid, budget=None, **fixed):
    """Any configuration of TTF that fits ``grid``; ``budget`` says which mode."""
    t, n = grid[0], math.prod(grid)
    options = {
        "threshold": draw(st.sampled_from([-1, 0.013, 0.317, 0.7, 0.931, 1.0])),
        "window": draw(st.sampled_from([1, 3, 5, 7])),
        "reference": draw(st.sampled_from(["anchor", "previous"])),
        "reduce": draw(st.sampled_from(["mean", "keep"])),
        "order": draw(st.sampled_from(["anchor_first", "time"])),
        "segments": draw(st.sampled_from(["auto", "single"])),
        "reanchor": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "guard": draw(st.sampled_from(["none", "motion"])),
        "min_tokens_per_frame": draw(st.sampled_from([0, 0, 1, 3, 100])),
        **fixed,
    }
    anchors = ["auto", "first"]
    if options["reference"] == "anchor":
        anchors.append(draw(st.integers(0, t - 1)))
    options.setdefault("anchor", draw(st.sampled_from(anchors)))
    if draw(st.booleans()) if budget is None else budget:
        options.setdefault("keep_ratio", draw(st.integers(1, n)) / n)
    return TTF(**options)


@st.composite
def cases(draw, grid=None, **fixed):
    """Tokens, and a configuration for them."""
    grid = draw(grids() if grid is None else grid)
    x = draw(videos(grid))
    return VisualTokens.from_grid(x, grid), draw(configs(grid, **fixed))


def same(a, b):
    orders = [plan.frame_order for plan in (a, b) if plan.frame_order is not None]
    alike = not orders or (len(orders) == 2 and torch.equal(*orders))
    return torch.equal(a.survivors, b.survivors) and torch.equal(a.target, b.target) and alike


# --- what holds for every configuration ---------------------------------------------------------


@given(cases())
def test_every_plan_is_valid_and_fuses_without_dropping(case):
    tokens, config = case
    plan = config.plan(tokens)
    plan.check(tokens.num_tokens)
    assert (plan.target >= 0).all(), "TTF drops nothing"
    assert plan.sizes.sum() == tokens.num_tokens
    known = config.num_kept(tokens.grid)
    assert known is None or known == plan.num_kept


@given(cases())
def test_compress_keeps_coordinates_and_the_sum_of_features(case):
    tokens, config = case
    out = config.compress(tokens)
    n, x = tokens.num_tokens, tokens.features
    order = out.plan.prompt_order(tokens.coords[out.plan.survivors, 0])
    assert torch.equal(out.coords, tokens.coords[out.plan.survivors[order]])
    assert torch.equal(out.sizes, out.plan.sizes[order])
    assert out.features.dtype == x.dtype
    if config.reduce == "keep":
        assert torch.equal(out.features, x[out.plan.survivors[order]])
        return
    total = (out.sizes[:, None] * out.features.double()).sum(0)
    # The result is rounded to its dtype once, the fp32 sum once per token.
    info, wide = torch.finfo(x.dtype), torch.finfo(torch.float32)
    allowed = (info.eps + n * wide.eps) * x.double().abs().sum(0) + n * info.smallest_normal
    assert ((total - x.double().sum(0)).abs() <= allowed).all()


@given(cases())
def test_two_calls_make_the_same_plan(case):
    tokens, config = case
    first = config.plan(tokens)
    assert same(first, config.plan(tokens))
    # A copy that lies otherwise in memory.
    x = tokens.features.T.contiguous().T
    assert same(first, config.plan(VisualTokens.from_grid(x, tokens.grid)))


@given(cases())
def test_the_configuration_survives_its_description(case):
    _, config = case
    described = config.describe()
    assert described.pop("strategy") == "ttf"
    assert TTF(**described) == config


@given(cases())
def test_compressing_twice_means_the_identity_on_survivors_and_changes_nothing(case):
    """A static plan speaks of source tokens; on its survivors it is the identity."""
    tokens, config = case
    once = config.compress(tokens)
    m = once.plan.num_kept
    assert same(once.plan.compose(FusionPlan.identity(m)), once.plan)
    survivors = VisualTokens.from_grid(once.features, (1, 1, m))
    twice = TTF(keep_ratio=1.0, reduce=config.reduce).compress(survivors)
    assert twice.plan.is_identity
    assert torch.equal(twice.features, once.features)


# --- how many tokens stay -----------------------------------------------------------------------


@given(cases(budget=True), st.integers(1, 1000))
def test_keep_ratio_leaves_exactly_its_ceiling(case, thousandths):
    tokens, config = case
    exact = config.model_copy(update={"keep_ratio": thousandths / 1000})
    expected = math.ceil(Fraction(thousandths, 1000) * tokens.num_tokens)
    if tokens.grid[0] == 1:
        expected = tokens.num_tokens
    assert exact.num_kept(tokens.grid) == expected
    plan = exact.plan(tokens)
    plan.check(tokens.num_tokens)
    assert plan.num_kept == expected
    assert plan.sizes.sum() == tokens.num_tokens


@given(cases(budget=True))
def test_a_budget_of_one_token_and_of_all_tokens(case):
    tokens, config = case
    n = tokens.num_tokens
    assume(tokens.grid[0] > 1)
    one = config.model_copy(update={"keep_ratio": 1 / n}).plan(tokens)
    one.check(n)
    assert one.num_kept == 1
    assert one.sizes.tolist() == [n]
    everything = config.model_copy(update={"keep_ratio": 1.0})
    assert same(everything.plan(tokens), FusionPlan.identity(n))
    assert torch.equal(everything.compress(tokens).features, tokens.features)


@given(cases(budget=False), st.lists(st.floats(-1, 1.1), min_size=2, max_size=4))
def test_a_higher_threshold_never_keeps_fewer_tokens(case, thresholds):
    """Whatever the other options are: neither anchors nor matches depend on the threshold."""
    tokens, config = case
    kept = [
        set(config.model_copy(update={"threshold": t}).plan(tokens).survivors.tolist())
        for t in sorted(thresholds)
    ]
    assert all(fewer <= more for fewer, more in itertools.pairwise(kept))


@given(cases(budget=False), st.floats(1, 10))
def test_a_threshold_of_one_or_more_keeps_everything(case, threshold):
    tokens, config = case
    # The same frame again and again: cosines of 1, some of them rounded to more.
    x = tokens.frames[:1].expand_as(tokens.frames)
    still = VisualTokens.from_grid(x.contiguous(), tokens.grid)
    plan = config.model_copy(update={"threshold": threshold}).plan(still)
    assert same(plan, FusionPlan.identity(tokens.num_tokens))


def test_a_similarity_equal_to_the_threshold_is_not_above_it():
    x = torch.tensor([[[[1.0, 1, 0]]], [[[1.0, 0, 1]]], [[[0.0, 0, 1]]]])  # 0.5, 0
    tokens = VisualTokens.from_grid(x, (3, 1, 1))
    for threshold, survivors in [(0.5, [0, 1, 2]), (0.49, [0, 2]), (0.0, [0, 2]), (-0.01, [0])]:
        config = TTF(threshold=threshold, anchor="first", segments="single")
        assert config.plan(tokens).survivors.tolist() == survivors


@given(grids(), st.data(), st.sampled_from([-0.5, 0.5, 0.7, 0.99, 0.99999]))
def test_identical_frames_leave_one_frame(grid, data, threshold):
    config = data.draw(configs(grid, budget=False, threshold=threshold, min_tokens_per_frame=0))
    frame = torch.randn(1, *grid[1:], 16, generator=torch.Generator().manual_seed(data.draw(SEEDS)))
    x = frame.to(data.draw(st.sampled_from(DTYPES))).expand(grid[0], -1, -1, -1)
    out = config.compress(VisualTokens.from_grid(x.contiguous(), grid))
    places = grid[1] * grid[2]
    anchor = config.anchor if isinstance(config.anchor, int) else 0
    assert out.plan.survivors.tolist() == list(range(anchor * places, (anchor + 1) * places))
    assert out.plan.target.tolist() == [*range(places)] * grid[0]
    assert out.sizes.tolist() == [grid[0]] * places
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(out.features, x[0].flatten(0, 1), rtol=eps, atol=0)


@given(cases(budget=False))
def test_min_tokens_per_frame_stay_in_every_frame(case):
    tokens, config = case
    least = min(config.min_tokens_per_frame, tokens.grid[1] * tokens.grid[2])
    assert (config.plan(tokens).frame_counts(tokens.grid) >= least).all()


@given(cases(budget=True, segments="single"), st.data())
def test_min_tokens_per_frame_stay_where_the_budget_holds_them(case, data):
    tokens, config = case
    places = tokens.grid[1] * tokens.grid[2]
    least = min(config.min_tokens_per_frame, places)
    enough = places + (tokens.grid[0] - 1) * least
    count = data.draw(st.integers(enough, tokens.num_tokens))
    config = config.model_copy(update={"keep_ratio": count / tokens.num_tokens})
    assert (config.plan(tokens).frame_counts(tokens.grid) >= least).all()


# --- scenes -------------------------------------------------------------------------------------


def scenes(order, seed, h=3, w=4, noise=0.05):
    """One frame per letter; different letters have orthogonal features."""
    random = torch.Generator().manual_seed(seed)
    letters = sorted(set(order))
    base = torch.zeros(len(letters), h, w, 5 * len(letters))
    for i in range(len(letters)):
        base[i, ..., 5 * i : 5 * i + 5] = torch.randn(h, w, 5, generator=random) + 3
    x = base[[letters.index(letter) for letter in order]]
    x = x * (1 + noise * torch.randn(x.shape, generator=random))
    return VisualTokens.from_grid(x, (len(order), h, w))


SCENES = {"segments": "auto", "order": "time"}
"""New anchors after scene changes, and frames in their order."""


def anchors(plan, grid):
    """The frames that survive whole."""
    places = grid[1] * grid[2]
    return [t for t, kept in enumerate(plan.frame_counts(grid).tolist()) if kept == places]


@given(st.sampled_from(["AB", "AAB", "ABB", "AABBB", "AAAABB"]), SEEDS)
def test_two_scenes_have_two_anchors_and_each_is_reduced(order, seed):
    tokens = scenes(order, seed)
    plan = TTF(**SCENES).plan(tokens)
    found = anchors(plan, tokens.grid)
    assert [order[t] for t in found] == ["A", "B"]
    assert plan.num_kept == 2 * 12
    frame_of = tokens.coords[:, 0]
    anchor_of = frame_of[plan.survivors][plan.target]
    for t, letter in enumerate(order):
        assert {order[a] for a in anchor_of[frame_of == t].tolist()} == {letter}

    first = TTF(**SCENES, anchor="first").plan(tokens)
    assert anchors(first, tokens.grid) == [0, order.index("B")]
    single = TTF(segments="single", anchor="first").plan(tokens)
    assert single.num_kept == 12 * (1 + order.count("B"))


@given(
    st.sampled_from(
        [
            # Frames that return to an anchored scene stand with its anchor.
            ("AABAA", "AB"),
            ("AAABBAA", "AB"),
            # Two runs that one anchor leaves open are two segments, though they look alike.
            ("AAABABA", "ABB"),
            ("AAABBAAACC", "ABC"),
            # One run of two scenes takes two rounds.
            ("AAAABBBCC", "ABC"),
            ("ABCDEABCDEAAAAAAAAAA", "ABCDEBCDE"),
        ]
    ),
    SEEDS,
)
def test_scenes_that_return(orders, seed):
    order, expected = orders
    tokens = scenes(order, seed)
    found = anchors(TTF(**SCENES, anchor="first").plan(tokens), tokens.grid)
    assert sorted(order[t] for t in found) == sorted(expected)


def test_reanchoring_ends_after_its_rounds():
    # With anchor "first" each round gives one more scene of a run an anchor.
    held = "ABCDEFGHI"[: REANCHOR_ROUNDS + 1]
    config = TTF(**SCENES, anchor="first")
    assert config.plan(scenes(held + held[-1], 0)).num_kept == 12 * len(held)
    assert config.plan(scenes(held + "XX", 0)).num_kept == 12 * (len(held) + 2)


@given(st.sampled_from(["AABAA", "ABAB", "AABBCC", "ABCABC"]), SEEDS)
def test_a_chain_begins_again_at_every_cut(order, seed):
    tokens = scenes(order, seed)
    plan = TTF(**SCENES, reference="previous").plan(tokens)
    cuts = [t for t in range(len(order)) if t == 0 or order[t] != order[t - 1]]
    assert anchors(plan, tokens.grid) == cuts
    assert plan.num_kept == 12 * len(cuts)
    assert TTF(reference="previous", segments="single").plan(tokens).num_kept == plan.num_kept


@given(st.sampled_from(["AB", "AABAA", "ABAB", "AABBCC"]), st.integers(1, 12 * 6), SEEDS)
def test_anchors_of_scenes_never_exceed_the_budget(order, count, seed):
    tokens = scenes(order, seed)
    assume(count <= tokens.num_tokens)
    plan = TTF(**SCENES, anchor="first", keep_ratio=count / tokens.num_tokens).plan(tokens)
    plan.check(tokens.num_tokens)
    assert plan.num_kept == count
    scenes_held = min(count // 12, len(set(order)))
    assert len(anchors(plan, tokens.grid)) >= scenes_held
    whole = TTF(**SCENES, anchor="first").plan(tokens)
    if 12 * len(anchors(whole, tokens.grid)) <= count:
        letter = torch.tensor([ord(c) for c in order])[tokens.coords[:, 0]]
        assert torch.equal(letter[plan.survivors][plan.target], letter), "each scene stays apart"


@pytest.mark.parametrize("reference", ["anchor", "previous"])
@given(
    st.integers(1, 6), st.integers(1, 7), st.integers(-1, 1), st.integers(-1, 1), SEEDS, st.data()
)
def test_a_pan_leaves_only_the_border_that_it_reveals(reference, h, w, down, right, seed, data):
    t = 2 if reference == "anchor" else data.draw(st.integers(2, 5))
    window = data.draw(st.sampled_from([3, 5, 7]))
    random = torch.Generator().manual_seed(seed)
    world = torch.randn(h + t, w + t, 16, generator=random)
    tops = [f if down > 0 else t - f if down < 0 else 0 for f in range(t)]
    lefts = [f if right > 0 else t - f if right < 0 else 0 for f in range(t)]
    x = torch.stack([world[a : a + h, b : b + w] for a, b in zip(tops, lefts, strict=True)])
    tokens = VisualTokens.from_grid(x, (t, h, w))
    config = TTF(threshold=0.9999, window=window, reference=reference, anchor="first")
    plan = config.plan(tokens)

    first_seen = {}
    for index, (f, i, j) in enumerate(tokens.coords.tolist()):
        first_seen.setdefault((tops[f] + i, lefts[f] + j), index)
    assert plan.survivors.tolist() == list(first_seen.values())
    roots = plan.survivors[plan.target].tolist()
    for index, (f, i, j) in enumerate(tokens.coords.tolist()):
        assert roots[index] == first_seen[tops[f] + i, lefts[f] + j]
    if (down or right) and min(h, w) > 1:
        blind = config.model_copy(update={"window": 1}).plan(tokens)
        assert blind.is_identity, "the window is what finds the motion"


def test_the_guard_lets_a_camera_pan():
    random = torch.Generator().manual_seed(0)
    world = torch.randn(8, 12, 16, generator=random)
    x = torch.stack([world[:, f : f + 8] for f in range(4)])
    tokens = VisualTokens.from_grid(x, (4, 8, 8))
    free = TTF(threshold=0.9999, reference="previous", segments="single", guard="none")
    plan = free.model_copy(update={"guard": "motion"}).plan(tokens)
    assert same(plan, free.plan(tokens)), "everything moved alike"
    assert plan.num_kept == 64 + 3 * 8


@pytest.mark.parametrize("reference", ["anchor", "previous"])
def test_the_guard_keeps_what_moves_by_itself_and_what_it_leaves(reference):
    background, object_ = torch.eye(4)[:2]
    x = background.expand(4, 7, 7, 4).clone()
    for f in range(4):
        x[f, 3, 1 + f] = object_
    tokens = VisualTokens.from_grid(x, (4, 7, 7))
    config = TTF(reference=reference, segments="single", guard="none")
    assert config.plan(tokens).num_kept < 49 + 6, "the object is taken for its old self"
    kept = config.model_copy(update={"guard": "motion"}).plan(tokens).survivors
    places = {tuple(c) for c in tokens.coords[kept].tolist() if c[0]}
    came = {(f, 3, 1 + f) for f in (1, 2, 3)}
    left = {(f, 3, 1 if reference == "anchor" else f) for f in (1, 2, 3)}
    assert places == came | left


@pytest.mark.parametrize("grid", [(3, 1, 1), (3, 1, 5), (3, 5, 1), (3, 2, 2)])
def test_the_guard_needs_no_neighbours(grid):
    x = torch.randn(1, *grid[1:], 8, generator=torch.Generator().manual_seed(1))
    still = VisualTokens.from_grid(x.expand(*grid, 8).contiguous(), grid)
    assert TTF(guard="motion").plan(still).num_kept == grid[1] * grid[2]


# --- zero vectors, lengths, dtypes --------------------------------------------------------------


@given(cases(budget=False, segments="single", reference="anchor"), st.data())
def test_zero_vectors_match_nothing(case, data):
    tokens, config = case
    zero = torch.rand(
        tokens.num_tokens, generator=torch.Generator().manual_seed(data.draw(SEEDS))
    ).lt(0.3)
    x = torch.where(zero[:, None], torch.zeros_like(tokens.features), tokens.features)
    tokens = VisualTokens.from_grid(x, tokens.grid)
    plan = config.plan(tokens)
    zero = (x == 0).all(-1)
    assert plan.keep_mask[zero].all()
    assert (plan.sizes[plan.target[zero]] == 1).all()


def test_zero_vectors_stay_before_others_and_else_go_to_their_own_place():
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    x[2, 1, 1:3] = 0
    tokens = VisualTokens.from_grid(x, (3, 2, 4))
    config = {"anchor": "first", "segments": "single"}
    two_more = TTF(keep_ratio=10 / 24, **config).plan(tokens)
    assert two_more.survivors.tolist() == [*range(8), 21, 22]
    one_frame = TTF(keep_ratio=8 / 24, **config).plan(tokens)
    assert one_frame.survivors.tolist() == [*range(8)]
    assert one_frame.target[21:23].tolist() == [5, 6]


@pytest.mark.parametrize("keep_ratio", [None, 0.1, 0.5])
def test_frames_of_zeros_alone_are_never_chosen_as_the_anchor(keep_ratio):
    x = scenes("AAAA", 0).frames.clone()
    x[0] = x[2] = 0
    tokens = VisualTokens.from_grid(x, (4, *x.shape[1:3]))
    plan = TTF(anchor="auto", keep_ratio=keep_ratio, segments="single").plan(tokens)
    plan.check(tokens.num_tokens)
    assert plan.sizes.sum() == tokens.num_tokens
    assert plan.frame_counts(tokens.grid)[1] > 0
    everything_zero = VisualTokens.from_grid(torch.zeros_like(x), (4, *x.shape[1:3]))
    TTF(keep_ratio=keep_ratio).plan(everything_zero).check(tokens.num_tokens)


@given(cases(anchor="first"), st.data())
def test_lengths_do_not_matter(case, data):
    tokens, config = case
    x = tokens.features.float()
    random = torch.Generator().manual_seed(data.draw(SEEDS))
    # Powers of two, so that no bit of a direction changes.
    lengths = 2.0 ** torch.randint(-20, 21, (len(x), 1), generator=random)
    plain = config.plan(VisualTokens.from_grid(x, tokens.grid))
    assert same(plain, config.plan(VisualTokens.from_grid(x * lengths, tokens.grid)))


@given(cases(), st.integers(0, 9))
def test_half_precision_does_not_overflow(case, exponent):
    tokens, config = case
    x = tokens.features.to(torch.float16)
    x = x / x.abs().max().clamp_min(1) / 2
    plain = config.plan(VisualTokens.from_grid(x * 2.0**exponent, tokens.grid))
    near_the_end = VisualTokens.from_grid(x * 2.0**16, tokens.grid)
    assert same(plain, config.plan(near_the_end))


@given(cases(), st.data())
def test_values_beyond_use_make_a_valid_plan_all_the_same(case, data):
    tokens, config = case
    x = tokens.features.float().clone()
    x[data.draw(st.integers(0, len(x) - 1))] = data.draw(
        st.sampled_from([math.nan, math.inf, 3e38, 1e-40])
    )
    plan = config.plan(VisualTokens.from_grid(x, tokens.grid, check=False))
    plan.check(len(x))
    assert plan.sizes.sum() == len(x)


# --- the definition in plain loops --------------------------------------------------------------


def differ(a, b, gap=1e-5):
    """Sure that fp32 sees what fp64 sees: ``a`` and ``b`` are equal or clearly apart."""
    assume(a == b or abs(a - b) >= gap)


def cosine(a, b):
    length = math.sqrt(sum(map(operator.mul, a, a)) * sum(map(operator.mul, b, b)))
    return round(sum(map(operator.mul, a, b)) / length, 9) if length else None


def exact(a, b):
    length = math.sqrt(sum(map(operator.mul, a, a)) * sum(map(operator.mul, b, b)))
    return sum(map(operator.mul, a, b)) / length


class Loops:
    """Survivors and roots by the definition: Python loops over fp64, one token at a time."""

    def __init__(self, x, config, count=None):
        self.config, self.count = config, count
        self.t, self.h, self.w = x.shape[:3]
        self.p = self.h * self.w
        self.x = x.double().flatten(1, 2).tolist()
        self.means = x.double().flatten(1, 2).mean(1).tolist()
        self.chained = config.reference == "previous"
        self.anchor_of = [self.first_anchor()] * self.t
        self.matches = self.match()
        self.refine()
        if count is not None and count < self.p:
            self.survivors, self.roots = self.part_of_a_frame()
        else:
            self.kept = self.choose()
            self.survivors = sorted(self.kept)
            self.roots = [self.root(i) for i in range(self.t * self.p)]

    def is_anchor(self, f):
        return self.anchor_of[f] == f

    def first_anchor(self):
        if self.t == 1 or self.chained or self.config.anchor == "first":
            return 0
        if self.config.anchor == "auto":
            return self.central(range(self.t))
        return self.config.anchor

    def central(self, run):
        """The frame of the run whose mean vector is nearest to the mean of all of them."""
        # The mean of a frame may be zero, and zero is like nothing.
        sound = [f for f in run if any(self.means[f])]
        if not sound:
            return min(run)
        for f in sound:
            # Sums of both signs may leave fp32 nothing but rounding.
            assume(max(map(abs, self.means[f])) > 1e-3)
        width = len(self.means[0])
        centre = [sum(self.means[f][d] for f in sound) / len(sound) for d in range(width)]
        assume(max(map(abs, centre)) > 1e-3)
        apart = {f: math.sqrt(max(0.0, 2 - 2 * exact(self.means[f], centre))) for f in sound}
        best = min(sound, key=lambda f: (apart[f], f))
        for f in sound:
            same = self.means[f] == self.means[best]
            assume(same or apart[f] - apart[best] >= 1e-4)
        return min(f for f in sound if self.means[f] == self.means[best])

    def match(self):
        reach = self.config.window // 2
        found = [[self.best(f, i, reach) for i in range(self.p)] for f in range(self.t)]
        if self.config.guard == "none" or reach == 0:
            return found
        here = [[self.best(f, i, 0) for i in range(self.p)] for f in range(self.t)]
        found = [
            [own if m is not None and own[0] == m[0] else m for m, own in zip(a, b, strict=True)]
            for a, b in zip(found, here, strict=True)
        ]
        return [
            [
                m if m is None or self.alike_around(row, i) else self.best(f, i, 0)
                for i, m in enumerate(row)
            ]
            for f, row in enumerate(found)
        ]

    def alike_around(self, row, place):
        """Whether most neighbours of a place found their match by the same shift."""
        i, j = place // self.w, place % self.w

        def shift(at):
            return row[at][1] % self.p // self.w - at // self.w, row[at][1] % self.w - at % self.w

        around = [
            y * self.w + z
            for y in range(max(0, i - 1), min(self.h, i + 2))
            for z in range(max(0, j - 1), min(self.w, j + 2))
            if (y, z) != (i, j)
        ]
        return sum(shift(at) == shift(place) for at in around) > len(around) / 2

    def best(self, f, place, reach):
        """The similarity of a token, and the source index of its match."""
        if self.is_anchor(f):
            return None
        other = f - 1 if self.chained else self.anchor_of[f]
        i, j = place // self.w, place % self.w
        best = None
        found = []
        for y in range(self.h):
            for z in range(self.w):
                di, dj = abs(y - i), abs(z - j)
                if di > reach or dj > reach:
                    continue
                s = cosine(self.x[f][place], self.x[other][y * self.w + z])
                if s is None:
                    continue
                found.append(s)
                if best is None or s > best[0]:
                    best = (s, y * self.w + z)
        if best is None:
            return -2.0, other * self.p + place
        for s in found:
            differ(s, best[0])
        assume(abs(best[0] - self.config.threshold) >= 1e-4)
        return best[0], other * self.p + best[1]

    def lost(self, f):
        if self.is_anchor(f):
            return False
        explained = sum(max(s, 0) for s, _ in self.matches[f]) / self.p
        assume(abs(explained - self.config.reanchor) >= 1e-4 or explained in (0, 1))
        return explained < self.config.reanchor

    def refine(self):
        most = self.t if self.count is None else self.count // self.p
        for _ in range(REANCHOR_ROUNDS if self.config.segments == "auto" else 0):
            runs = []
            for f in range(self.t):
                if not self.lost(f):
                    continue
                if not self.chained and runs and runs[-1][-1] == f - 1:
                    runs[-1].append(f)
                else:
                    runs.append([f])
            spent = sum(map(self.is_anchor, range(self.t)))
            runs = runs[: max(0, most - spent)]
            if not runs:
                return
            for run in runs:
                first = self.chained or self.config.anchor == "first"
                anchor = run[0] if first else self.central(run)
                for f in run:
                    self.anchor_of[f] = anchor
            self.matches = self.match()

    def frame_order(self):
        """Each anchor right before the first frame that belongs to it, the others in time."""
        if self.config.order == "time" or self.chained or self.config.anchor == "first":
            return range(self.t)
        before = {f: [] for f in range(self.t)}
        for a in sorted(set(self.anchor_of)):
            before[min(f for f in range(self.t) if self.anchor_of[f] == a)].append(a)
        shown = []
        for f in range(self.t):
            shown += before[f]
            if not self.is_anchor(f):
                shown.append(f)
        return shown

    def choose(self):
        """Source indices of the survivors."""
        classes = {}
        least = min(self.config.min_tokens_per_frame, self.p)
        for f in range(self.t):
            for i in range(self.p):
                classes[f * self.p + i] = (
                    (0, 0) if self.is_anchor(f) else (2, self.matches[f][i][0])
                )
            if self.is_anchor(f):
                continue
            order = sorted(range(self.p), key=lambda i: (self.matches[f][i][0], i))
            if 0 < least < self.p:
                differ(self.matches[f][order[least - 1]][0], self.matches[f][order[least]][0])
            for i in order[:least]:
                classes[f * self.p + i] = (1, self.matches[f][i][0])
        if self.count is None:
            return {i for i, (c, s) in classes.items() if c < 2 or s <= self.config.threshold}
        order = sorted(classes, key=lambda i: (*classes[i], i))
        if self.count < len(order):
            last, next_ = classes[order[self.count - 1]], classes[order[self.count]]
            assume(last[0] != next_[0] or last[1] == next_[1] or next_[1] - last[1] >= 1e-5)
        return set(order[: self.count])

    def root(self, index):
        while index not in self.kept:
            index = self.matches[index // self.p][index % self.p][1]
        return index

    def part_of_a_frame(self):
        anchor = self.anchor_of[0]
        start = anchor * self.p
        self.kept = set(range(start, start + self.p))
        roots = [self.root(i) for i in range(self.t * self.p)]
        order = sorted(self.kept, key=lambda i: (-roots.count(i), i))
        chosen = sorted(order[: self.count])
        heirs = {}
        for i in self.kept:
            likes = [
                (cosine(self.x[anchor][i - start], self.x[anchor][c - start]), c) for c in chosen
            ]
            likes = [(-2.0 if s is None else s, c) for s, c in likes]
            best = max(s for s, _ in likes)
            for s, _ in likes:
                if i not in chosen:
                    differ(s, best)
            heirs[i] = i if i in chosen else min(c for s, c in likes if s == best)
        return chosen, [heirs[r] for r in roots]


def agree(x, grid, config, count=None):
    expected = Loops(x, config, count)
    tokens = VisualTokens.from_grid(x, grid)
    plan = config.plan(tokens)
    assert plan.survivors.tolist() == expected.survivors
    assert plan.survivors[plan.target].tolist() == expected.roots
    order = expected.frame_order() if plan.num_kept < plan.num_source else range(grid[0])
    assert [*order] == (
        [*range(grid[0])] if plan.frame_order is None else plan.frame_order.tolist()
    )
    frames = [index // (grid[1] * grid[2]) for index in expected.survivors]
    shown = [i for f in order for i, g in zip(expected.survivors, frames, strict=True) if f == g]
    assert torch.equal(config.compress(tokens).coords, tokens.coords[shown])


SMALL = grids(5, 4, 4)


@pytest.mark.parametrize("segments", ["single", "auto"])
@pytest.mark.parametrize("reference", ["anchor", "previous"])
@given(st.data())
def test_threshold_mode_agrees_with_plain_loops(segments, reference, data):
    grid = data.draw(SMALL)
    config = data.draw(configs(grid, budget=False, segments=segments, reference=reference))
    assume(config.threshold < 1)
    agree(data.draw(videos(grid, widths=(2, 3, 6))), grid, config)


@pytest.mark.parametrize("segments", ["single", "auto"])
@pytest.mark.parametrize("reference", ["anchor", "previous"])
@given(st.data())
def test_keep_ratio_mode_agrees_with_plain_loops(segments, reference, data):
    grid = data.draw(SMALL)
    count = data.draw(st.integers(1, math.prod(grid)))
    fixed = {"segments": segments, "reference": reference, "keep_ratio": count / math.prod(grid)}
    config = data.draw(configs(grid, budget=True, **fixed))
    assume(config.threshold < 1)
    # An image keeps everything, whatever the budget.
    count = math.prod(grid) if grid[0] == 1 else count
    agree(data.draw(videos(grid, widths=(2, 3, 6))), grid, config, count)


# --- host synchronisation -----------------------------------------------------------------------


def meta_tokens(grid, width=8):
    """Tokens without data: reading any value of them, or of what is made of them, raises."""
    return VisualTokens.from_grid(torch.empty(*grid, width, device="meta"), grid, check=False)


@pytest.mark.parametrize("keep_ratio", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("min_tokens_per_frame", [0, 3])
@pytest.mark.parametrize("segments", ["auto", "single"])
@pytest.mark.parametrize(
    ("reference", "anchor"),
    [("anchor", "auto"), ("anchor", "first"), ("anchor", 3), ("previous", "auto")],
)
@pytest.mark.parametrize("guard", ["none", "motion"])
def test_keep_ratio_mode_never_reads_a_value(
    guard, reference, anchor, segments, min_tokens_per_frame, keep_ratio
):
    grid = (5, 3, 4)
    config = TTF(
        guard=guard,
        reference=reference,
        anchor=anchor,
        segments=segments,
        min_tokens_per_frame=min_tokens_per_frame,
        keep_ratio=keep_ratio,
    )
    out = config.compress(meta_tokens(grid))
    assert out.features.shape == (60 * keep_ratio, 8)
    assert out.plan.target.shape == (60,)


@given(cases(budget=True))
def test_what_is_done_elsewhere_than_on_a_cpu_makes_the_same_plan(case):
    tokens, config = case
    expected = config.plan(tokens)
    with pytest.MonkeyPatch.context() as patch:
        for module in (window, ttf):
            patch.setattr(module, "on_host", lambda _: False)
        assert same(config.plan(tokens), expected)


@pytest.mark.parametrize("read", [bool, float, torch.Tensor.tolist, torch.nonzero])
def test_reading_a_value_of_tensors_without_data_does_raise(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.empty((), device="meta"))


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("reference", ["anchor", "previous"])
def test_threshold_mode_reads_once_and_once_more_per_round(monkeypatch, rounds, reference):
    reads = []

    def tolist(tensor):
        reads.append(tensor)
        return [30, int(len(reads) <= rounds)]  # survivors, new segments

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    plan = TTF(reference=reference, segments="auto").plan(meta_tokens((5, 4, 4)))
    assert len(reads) == 1 + rounds
    assert plan.num_kept == 30


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "3 or 5"),
        ({"window": 0}, "greater than or equal to 1"),
        ({"threshold": -1.5}, "greater than or equal to -1"),
        ({"threshold": math.nan}, "greater than or equal to -1"),
        ({"keep_ratio": 0}, "greater than 0"),
        ({"keep_ratio": 1.5}, "less than or equal to 1"),
        ({"anchor": -1}, "greater than or equal to 0"),
        ({"anchor": True}, "valid integer"),
        ({"anchor": "last"}, "'auto' or 'first'"),
        ({"anchor": 2, "reference": "previous"}, "use anchor: first"),
        ({"pruning_rate": 0.5}, "not permitted"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        TTF(**options)


@pytest.mark.parametrize("keep_ratio", [None, 0.4, 0.1])
def test_an_anchor_beyond_the_video_is_refused_with_the_range(keep_ratio):
    tokens = VisualTokens.from_grid(torch.randn(3, 2, 2, 4), (3, 2, 2))
    TTF(anchor=2, keep_ratio=keep_ratio).plan(tokens).check(12)
    with pytest.raises(ConfigError, match=r"anchor: 3 .* expected 0\.\.2"):
        TTF(anchor=3, keep_ratio=keep_ratio).plan(tokens)


@given(grids(t=1), st.data())
def test_an_image_stays_as_it_is_whatever_the_options_say(grid, data):
    x = data.draw(videos(grid))
    tokens = VisualTokens.from_grid(x, grid)
    config = data.draw(configs(grid, anchor=7, reference="anchor"))
    assert same(config.plan(tokens), FusionPlan.identity(tokens.num_tokens))
    assert config.num_kept(grid) == tokens.num_tokens


def test_matching_flops_are_the_published_figure():
    assert TTF().matching_flops((16, 16, 16), 4096) == 15 * 256 * 9 * 4096
    assert TTF().matching_flops((16, 16, 16), 4096) / 1e9 == pytest.approx(0.16, rel=0.15)
    assert TTF().matching_flops((1, 16, 16), 4096) == 0
    assert TTF(guard="motion").matching_flops((2, 3, 3), 8) == 9 * 9 * 8


# --- cost ---------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the elements of all tensors that operations read or write; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.elements += sum(x.numel() for x in tensors)
        return out


def test_a_plan_reads_and_writes_a_multiple_of_the_tokens_however_many_they_are():
    random = torch.Generator().manual_seed(0)
    still = torch.randn(1, 16, 16, 1024, generator=random)
    x = still + 0.5 * torch.randn(16, 16, 16, 1024, generator=random)
    tokens, config = VisualTokens.from_grid(x, (16, 16, 16)), TTF()
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        config.plan(tokens)
    assert traffic.elements <= 20 * x.numel()
    # Neighbourhoods of tiles overlap.
    multiply_adds = flops.get_total_flops() / 2
    assert multiply_adds <= 4.5 * config.matching_flops((16, 16, 16), 1024)


@st.composite
def partial_videos(draw):
    """Tokens of a grid of which some places hold none, and the mask of those that do."""
    grid = draw(grids(5, 4, 5))
    n = math.prod(grid)
    assume(n > 1)
    x = draw(videos(grid, dtypes=(torch.float32,)))
    random = torch.Generator().manual_seed(draw(SEEDS))
    there = torch.rand(n, generator=random) < draw(st.sampled_from([0.2, 0.6, 0.95]))
    there[int(torch.randint(n, (1,), generator=random))] = True
    if draw(st.booleans()):
        there.view(grid[0], -1)[draw(st.integers(0, grid[0] - 1))] = False
        there[draw(st.integers(0, n - 1))] = True
    index = there.nonzero().flatten()
    rows = x.flatten(0, 2)
    return VisualTokens.from_grid(x, grid).after(index, rows[index]), there, x


@given(case=partial_videos(), data=st.data())
def test_places_without_a_token_are_like_nothing(case, data):
    """The plan is that of a whole grid with zeros there, but for the zeros."""
    tokens, there, x = case
    options = {
        "threshold": data.draw(st.sampled_from([-1, 0.3, 0.7, 1.0])),
        "window": data.draw(st.sampled_from([1, 3, 5])),
        "guard": data.draw(st.sampled_from(["none", "motion"])),
        "min_tokens_per_frame": 0,
    }
    if data.draw(st.booleans()):
        options |= {"reference": "previous"}
    else:
        options |= {"anchor": data.draw(st.integers(0, tokens.grid[0] - 1))}
    zeros = x.flatten(0, 2) * there[:, None]
    whole = TTF(**options).plan(VisualTokens.from_grid(zeros, tokens.grid))
    mine = TTF(**options).plan(tokens)
    mine.check(tokens.num_tokens, tokens.grid[0])
    index = there.nonzero().flatten()
    assert set(index[mine.survivors].tolist()) == set(whole.survivors.tolist()) & set(
        index.tolist()
    )
    roots = whole.survivors[whole.target[index]]
    assert torch.equal(index[mine.survivors[mine.target]], roots)
    if mine.frame_order is not None or whole.frame_order is not None:
        assert mine.is_identity or torch.equal(mine.frame_order, whole.frame_order)


@given(case=partial_videos(), data=st.data())
def test_a_partial_grid_meets_every_budget(case, data):
    tokens = case[0]
    ratio = data.draw(st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]))
    options = {
        "anchor": data.draw(st.sampled_from(["auto", "first"])),
        "segments": data.draw(st.sampled_from(["single", "auto"])),
        "reference": data.draw(st.sampled_from(["anchor", "previous"])),
        "reduce": data.draw(st.sampled_from(["keep", "mean"])),
        "min_tokens_per_frame": data.draw(st.sampled_from([0, 2])),
        "keep_ratio": ratio,
    }
    strategy = TTF(**options)
    plan = strategy.plan(tokens)
    plan.check(tokens.num_tokens, tokens.grid[0])
    whole = tokens.grid[0] == 1
    assert plan.num_kept == (
        tokens.num_tokens if whole else math.ceil(Fraction(str(ratio)) * tokens.num_tokens)
    )
    assert strategy.fuse(plan, tokens.features).shape == (plan.num_kept, tokens.features.shape[1])
