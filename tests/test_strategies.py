"""What every registered strategy holds to, those of installed plugins included."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokenfuse
from models import frames, model_of, prompt, user
from tokenfuse import FusionPlan, VisualTokens, load_strategy
from tokenfuse.errors import ConfigError
from tokenfuse.registry import registry
from tokenfuse.strategies.base import Budgeted
from tokenfuse.strategies.select import budget
from tokenfuse.tokens import grid_coords

pytestmark = pytest.mark.usefixtures("one_thread")

# What a strategy needs that cannot be made from its name alone.
OPTIONS = {
    "by_modality": {"video": {"compose": ["ttf", "attention"]}, "image": "visionzip"},
    "compose": {"compose": ["ttf", "attention"]},
}
NAMES = sorted(
    name for name, entry in registry().strategies.items() if entry.cls.stage == "pre_llm"
)
BUDGETED = [name for name in NAMES if "keep_ratio" in registry().strategy(name).model_fields]
# Chains leave fewer where their first steps do.
EXACT = [name for name in BUDGETED if name != "compose"]
TEMPORAL = [name for name in NAMES if registry().strategy(name).temporal]

every = pytest.mark.parametrize("name", NAMES)
budgeted = pytest.mark.parametrize("name", BUDGETED)
exact = pytest.mark.parametrize("name", EXACT)

KINDS = ["random", "video", "scenes", "palette", "identical", "static", "zeros", "some zeros"]
GRIDS = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([(1, 1, 1), (1, 4, 5), (6, 1, 1), (2, 1, 7)]),
)


def make(name, **options):
    return load_strategy({"strategy": name, **OPTIONS.get(name, {}), **options})


def features_of(grid, kind, seed, width=16):
    """Features of a video of some kind, ``(N, D)``, whose values bf16 holds exactly."""
    rng = torch.Generator().manual_seed(seed)
    t, h, w = grid
    noise = torch.randn(t, h, w, width, generator=rng)
    scene = torch.randn(1, h, w, width, generator=rng)
    if kind == "video":
        noise = scene + 0.4 * noise
    elif kind == "scenes":
        scenes = torch.randn(3, h, w, width, generator=rng)
        noise = scenes[torch.arange(t) * 3 // t] + 0.2 * noise
    elif kind == "palette":
        colours = torch.randn(64, width, generator=rng)
        noise = colours[torch.randint(64, (t, h, w), generator=rng)] + 0.1 * noise
    elif kind == "identical":
        noise = scene[:, :1, :1].expand(t, h, w, width)
    elif kind == "static":
        noise = scene.expand(t, h, w, width)
    elif kind == "zeros":
        noise = torch.zeros(t, h, w, width)
    elif kind == "some zeros":
        noise = noise * (torch.rand(t, h, w, 1, generator=rng) > 0.4)
    return noise.flatten(0, 2).bfloat16().float()


def tokens_of(grid, kind="video", seed=0, width=16, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed + 1)
    n = math.prod(grid)
    saliency = torch.rand(n, generator=rng).bfloat16().to(dtype)
    if kind in ("identical", "zeros"):
        saliency = torch.full_like(saliency, 1 / n)
    text = torch.randn(7, width, generator=rng).bfloat16().to(dtype)
    features = features_of(grid, kind, seed, width).to(dtype)
    return VisualTokens.from_grid(features, grid, saliency=saliency, text=text)


def kept(name, grid, count):
    """How many tokens stay where ``count`` are asked for."""
    return math.prod(grid) if name in TEMPORAL and grid[0] == 1 else count


def ratios(grid):
    return [None, 1 / math.prod(grid), 0.1, 0.5, 0.77, 1.0]


@every
@settings(max_examples=60)
@given(GRIDS, st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 5))
def test_a_plan_is_valid_and_what_it_makes_is_finite(name, grid, kind, seed, which):
    ratio = ratios(grid)[which] if name in BUDGETED else None
    strategy = make(name, keep_ratio=ratio) if ratio else make(name)
    tokens = tokens_of(grid, kind, seed)
    n = tokens.num_tokens
    out = strategy.compress(tokens)
    plan = out.plan
    plan.check(n)
    if ratio and name in EXACT:
        assert plan.num_kept == kept(name, grid, budget(ratio, n)) == strategy.num_kept(grid)
    if strategy.num_kept(grid) is not None:
        assert plan.num_kept == strategy.num_kept(grid)
    assert out.features.shape == (plan.num_kept, 16)
    assert out.features.isfinite().all()
    assert torch.equal(out.coords, grid_coords(grid)[plan.survivors])
    assert torch.equal(out.sizes, plan.sizes)
    assert int(out.sizes.min()) >= 1
    assert int(out.sizes.sum()) + int((plan.target == -1).sum()) == n
    if plan.is_identity:
        assert torch.equal(out.features, tokens.features)
    # DeepStack features have a width of their own, and go by the same plan.
    other = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    fused = strategy.fuse(plan, other)
    assert fused.shape == (plan.num_kept, 5)
    assert fused.isfinite().all()


@exact
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 7), (4, 3, 3), (7, 2, 5), (16, 1, 1)])
def test_every_budget_is_met(name, grid):
    n = math.prod(grid)
    tokens = tokens_of(grid)
    for count in range(1, n + 1):
        strategy = make(name, keep_ratio=count / n)
        expected = kept(name, grid, count)
        assert strategy.num_kept(grid) == expected
        plan = strategy.plan(tokens)
        plan.check(n)
        assert plan.num_kept == expected


def test_the_built_in_strategies_that_compare_frames_only():
    built_in = {
        name for name in TEMPORAL if registry().strategies[name].distribution == "tokenfuse"
    }
    assert built_in == {"dycoke", "evs", "frame_subsample", "ttf"}


@pytest.mark.parametrize("name", TEMPORAL)
@pytest.mark.parametrize("ratio", [None, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["video", "identical", "zeros"])
def test_what_compares_frames_leaves_an_image_as_it_is(name, ratio, kind):
    strategy = make(name, keep_ratio=ratio) if ratio else make(name)
    grid = (1, 3, 5)
    tokens = tokens_of(grid, kind)
    out = strategy.compress(tokens)
    assert out.plan.is_identity
    assert torch.equal(out.features, tokens.features)
    assert strategy.num_kept(grid) == 15
    assert strategy.matching_flops(grid, 16) == 0


@budgeted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_keep_ratio_of_one_changes_nothing(name, dtype):
    tokens = tokens_of((4, 3, 5), dtype=dtype)
    strategy = make(name, **{"keep_ratio": 1.0} | OPTIONS.get(name, {}))
    if name == "compose":
        strategy = make(name, compose=["uniform"], keep_ratio=1.0)
    out = strategy.compress(tokens)
    assert out.plan.is_identity
    assert torch.equal(out.features, tokens.features)


@every
@pytest.mark.parametrize("kind", ["video", "scenes", "identical"])
def test_a_plan_depends_on_the_tokens_alone(name, kind):
    strategy, tokens = make(name), tokens_of((6, 4, 4), kind)
    first = strategy.plan(tokens)
    torch.rand(17)
    strategy.plan(tokens_of((5, 3, 4), "random", seed=8))
    for again in (strategy.plan(tokens), make(name).plan(tokens)):
        assert torch.equal(again.survivors, first.survivors)
        assert torch.equal(again.target, first.target)


@every
@pytest.mark.parametrize("kind", ["video", "scenes", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_equal_values_changes_no_selection(name, kind, dtype):
    wide, other = tokens_of((6, 4, 4), kind), tokens_of((6, 4, 4), kind, dtype=dtype)
    for ratio in (None, 0.3) if name in BUDGETED else (None,):
        strategy = make(name, keep_ratio=ratio) if ratio else make(name)
        plan, twin = strategy.plan(wide), strategy.plan(other)
        assert torch.equal(plan.survivors, twin.survivors)
        assert torch.equal(plan.target, twin.target)
        assert strategy.fuse(twin, other.features).dtype == dtype


@every
def test_it_works_in_inference_mode_and_records_no_gradient(name):
    strategy, tokens = make(name), tokens_of((5, 3, 4))
    plan = strategy.plan(tokens)
    with torch.inference_mode():
        inside = strategy.compress(tokens_of((5, 3, 4)))
    assert torch.equal(inside.plan.target, plan.target)
    learning = tokens_of((5, 3, 4))
    learning.features.requires_grad_()
    out = strategy.compress(learning)
    assert torch.equal(out.plan.target, plan.target)
    out.features.sum().backward()
    assert learning.features.grad.isfinite().all()
    assert learning.features.grad.abs().sum() > 0, "what survives can be trained through"


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                # What an expanded view shows is not there.
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return out


@every
def test_a_long_video_needs_no_square_matrix(name):
    grid = (64, 24, 24)
    n = math.prod(grid)
    tokens = tokens_of(grid, "palette", width=8)
    strategy = make(name, keep_ratio=0.02) if name in BUDGETED else make(name)
    with Largest() as seen:
        plan = strategy.plan(tokens)
    plan.check(n)
    assert seen.elements < n * n / 20


@every
@pytest.mark.parametrize("positions", ["keep", "contiguous"])
def test_a_model_s_batch_is_planned_as_each_prompt_alone(name, positions):
    model = model_of()
    strategy = make(name, positions=positions, **{"keep_ratio": 0.4} if name in BUDGETED else {})
    videos, asked = [frames(5, 2), frames(6, 4)], ["What color is it?", "How many?"]
    texts = [user("video", question) for question in asked]
    both = tokenfuse.compress(model, prompt(texts, videos=videos), strategy)
    length = both["input_ids"].shape[1]
    for row, (text, video) in enumerate(zip(texts, videos, strict=True)):
        alone = tokenfuse.compress(model, prompt([text], videos=[video]), strategy)
        assert torch.equal(both.plans["video"][row].target, alone.plans["video"][0].target)
        own = alone["input_ids"].shape[1]
        assert torch.equal(both["input_ids"][row, length - own :], alone["input_ids"][0])
        kept = both["position_ids"][:, row, length - own :]
        assert torch.equal(kept, alone["position_ids"][:, 0])
        if positions == "contiguous":
            assert torch.equal(kept, torch.arange(own).expand(4, own))
    assert both.report.tokens_after < both.report.tokens_before or name == "ttf"
    answer = model.generate(**both, max_new_tokens=2)
    assert answer.shape == (2, length + 2)


def test_a_temporal_strategy_without_options_passes_images_and_asks_for_a_keep_ratio_for_videos():
    class BareTemporal(Budgeted):
        """Nothing but a budget."""

        name: ClassVar[str] = "bare_temporal"
        temporal: ClassVar[bool] = True

        def choose(self, tokens, count):
            return FusionPlan.from_survivors(torch.arange(count), tokens.num_tokens)

    assert BareTemporal().plan(tokens_of((1, 2, 2))).is_identity
    assert BareTemporal(keep_ratio=0.5).plan(tokens_of((2, 2, 2))).num_kept == 4
    with pytest.raises(ConfigError, match="has no option but keep_ratio"):
        BareTemporal().plan(tokens_of((2, 2, 2)))


def test_a_strategy_without_options_of_its_own_asks_for_a_keep_ratio():
    class Bare(Budgeted):
        """Nothing but a budget."""

        name: ClassVar[str] = "bare"

        def choose(self, tokens, count):
            return FusionPlan.from_survivors(torch.arange(count), tokens.num_tokens)

    tokens = tokens_of((2, 2, 2))
    assert Bare(keep_ratio=0.5).plan(tokens).num_kept == 4
    with pytest.raises(ConfigError, match="strategy bare has no option but keep_ratio"):
        Bare().plan(tokens)
