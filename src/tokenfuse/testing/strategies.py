"""The conformance kit for strategies: what a plan has to hold to, whatever the tokens show."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenfuse.config import KEY, get_strategy
from tokenfuse.ops.select import budget
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.registry import default_registry
from tokenfuse.strategies._base import Compressed, Strategy
from tokenfuse.tokens import Grid, VisualTokens, grid_coords

Kind = Literal["random", "video", "scenes", "palette", "identical", "static", "zeros", "some zeros"]
"""What a made-up video shows; see features_of."""

KINDS: Sequence[Kind] = get_args(Kind)

GRIDS: SearchStrategy[Grid] = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([(1, 1, 1), (1, 4, 5), (6, 1, 1), (2, 1, 7)]),
)
"""Small grids for hypothesis: odd sides, single frames, rows, columns and places among them."""

FEW_KINDS: Sequence[Kind] = ("video", "scenes", "random")
WIDTH = 16
LONG: Grid = (48, 20, 20)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def features_of(grid: Grid, kind: Kind = "video", seed: int = 0, width: int = WIDTH) -> Tensor:
    """Features of a made-up video, ``(N, width)`` fp32, whose values bf16 and fp16 hold exactly.

    ``random``: noise. ``video``: one scene and noise, ``scenes``: three of them. ``palette``: each
    token one of 64 colours, with some noise. ``identical``: one vector everywhere, ``static``: one
    frame again and again. ``zeros``: nothing but zeros, ``some zeros``: noise among them.
    """
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
    return _in_every_dtype(noise.flatten(0, 2))


def tokens_of(
    grid: Grid,
    kind: Kind = "video",
    seed: int = 0,
    width: int = WIDTH,
    dtype: torch.dtype = torch.float32,
) -> VisualTokens:
    """Tokens with ``features_of`` and all else that a strategy may need: saliency and text.

    Equal arguments make equal tokens, and another ``dtype`` holds the same values.
    """
    rng = torch.Generator().manual_seed(seed + 1)
    n = math.prod(grid)
    saliency = _in_every_dtype(torch.rand(n, generator=rng))
    if kind in ("identical", "zeros"):
        saliency = _in_every_dtype(torch.full_like(saliency, 1 / n))
    text = _in_every_dtype(torch.randn(7, width, generator=rng))
    features = features_of(grid, kind, seed, width).to(dtype)
    return VisualTokens.from_grid(features, grid, saliency=saliency.to(dtype), text=text.to(dtype))


def _in_every_dtype(x: Tensor) -> Tensor:
    # The 8 bits of bf16, no smaller than fp16 goes: all of DTYPES hold the values.
    return x.bfloat16().half().float()


class Case(NamedTuple):
    """Tokens, by the arguments of tokens_of, and the ``keep_ratio`` asked for, if any."""

    grid: Grid
    kind: Kind
    seed: int
    keep_ratio: float | None


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    grid = draw(GRIDS)
    ratios = [None, 1 / math.prod(grid), 0.1, 0.5, 0.77, 1.0]
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 99))
    return Case(grid, kind, seed, draw(st.sampled_from(ratios)))


class _Made:
    """A strategy, tokens, and what the strategy makes of them, each made on first use."""

    def __init__(self, kit: StrategyConformance, case: Case) -> None:
        ratio = case.keep_ratio if kit._budgeted else None
        self.case = case
        self.strategy = kit.make() if ratio is None else kit.make(keep_ratio=ratio)
        self.tokens = tokens_of(case.grid, case.kind, case.seed)
        self.count = None
        """How many tokens have to stay, where that is known."""
        # Its own, which is a default where none was asked for.
        ratio = getattr(self.strategy, "keep_ratio", None)
        if ratio is not None and kit.exact:
            self.count = _count(self.strategy, case.grid, budget(ratio, self.n))

    @property
    def n(self) -> int:
        return math.prod(self.case.grid)

    @cached_property
    def out(self) -> Compressed:
        return _unchecked(self.strategy, self.tokens)

    @cached_property
    def plan(self) -> FusionPlan:
        try:
            return self.out.plan
        except Exception:
            # A plan that is not valid may be impossible to apply.
            return self.strategy.plan(self.tokens)

    @cached_property
    def other(self) -> Tensor:
        """What a layer of the vision tower might have beside the features."""
        rng = torch.Generator().manual_seed(self.case.seed)
        return torch.randn(self.n, 5, generator=rng)

    @cached_property
    def deepstack(self) -> Tensor:
        return self.strategy.fuse(self.plan, self.other)


# What holds for every case, by the methods of the kit. The kit looks at all of these for each case,
# because planning is what takes time.


def _valid(made: _Made) -> None:
    _check(made.plan, made.n)


def _ordered(made: _Made) -> None:
    assert _increasing(made.plan), f"survivors are {made.plan.survivors.tolist()}"


def _finite(made: _Made) -> None:
    assert made.out.features.isfinite().all(), "fused features hold NaN or Inf"
    assert made.deepstack.isfinite().all(), "fused DeepStack features hold NaN or Inf"


def _placed(made: _Made) -> None:
    coords = grid_coords(made.case.grid)[made.plan.survivors]
    coords = coords[made.plan.prompt_order(coords[:, 0])]
    assert made.out.features.shape == (made.plan.num_kept, WIDTH)
    assert torch.equal(made.out.coords, coords), "coords are not those of the survivors"


def _accounted(made: _Made) -> None:
    sizes, plan = made.out.sizes, made.plan
    dropped = int((plan.target == DROPPED).sum())
    order = plan.prompt_order(grid_coords(made.case.grid)[plan.survivors, 0])
    assert torch.equal(sizes, plan.sizes[order]), "sizes are not those of the plan"
    assert int(sizes.min()) >= 1, "a survivor stands for nothing, not even itself"
    assert int(sizes.sum()) + dropped == made.n, (
        f"survivors stand for {int(sizes.sum())} tokens and {dropped} are dropped, of {made.n}"
    )


def _met(made: _Made) -> None:
    if made.count is not None:
        assert made.plan.num_kept == made.count, (
            f"{made.plan.num_kept} tokens stay; {made.count} were asked for"
        )


def _counted(made: _Made) -> None:
    said = made.strategy.num_kept(made.case.grid)
    # A budget that is missed is another failure than a wrong count.
    truth = made.plan.num_kept if made.count is None else made.count
    unknown = said is None and made.count is None
    assert unknown or said == truth, f"num_kept says {said}; it is {truth}"


def _untouched(made: _Made) -> None:
    if made.plan.is_identity:
        # Which dtype comes out is another matter.
        features = made.out.features.to(made.tokens.features.dtype)
        assert torch.equal(features, made.tokens.features), "features changed, though all stay"


def _columnwise(made: _Made) -> None:
    fused = made.deepstack
    assert fused.shape == (made.plan.num_kept, made.other.shape[1])
    both = made.strategy.fuse(made.plan, torch.cat([made.tokens.features, made.other], 1))
    torch.testing.assert_close(
        both[:, WIDTH:], fused, rtol=1e-4, atol=1e-4, equal_nan=True, check_dtype=False
    )


Judge = Callable[[_Made], None]
JUDGES: Sequence[Judge] = (
    _valid,
    _ordered,
    _finite,
    _placed,
    _accounted,
    _met,
    _counted,
    _untouched,
    _columnwise,
)


@dataclass(frozen=True)
class _Budget:
    """A budget and the plan for it, or the error that there was instead."""

    grid: Grid
    count: int
    strategy: Strategy
    plan: FusionPlan | Exception

    def __str__(self) -> str:
        n = math.prod(self.grid)
        return f"keep_ratio {self.strategy.model_dump().get('keep_ratio')} of {n}, grid {self.grid}"


_found: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()
"""What was found out about the strategy of a kit's class, and is wanted by several methods."""


class StrategyConformance:
    """Everything that a strategy before the LLM promises, as tests. A subclass makes the strategy.

    ::

        class TestMine(StrategyConformance):
            def make(self, **options):
                return Mine(**options)

    ``make()`` makes one that needs no further option to plan. Where its class has the field
    ``keep_ratio``, the kit also asks for ``make(keep_ratio=r)``. Both make a new one at each call.
    """

    exact: ClassVar[bool] = True
    """Whether exactly ⌈keep_ratio · N⌉ tokens stay; False for chains, which may leave fewer."""

    def make(self, **options: Any) -> Strategy:
        """A new strategy with these options."""
        raise NotImplementedError(f"{type(self).__name__} has no method make(self, **options)")

    # What a plan is

    def test_a_plan_is_valid(self) -> None:
        """Else there are no such tokens, or a token goes into one that is not there.

        On odd grids, on images, for each budget, and for a long video.
        """
        self._hold(_valid)
        for asked in self._budgets:
            if isinstance(asked.plan, FusionPlan):
                _check(asked.plan, math.prod(asked.grid))
        if isinstance(self._long, FusionPlan):
            _check(self._long, math.prod(LONG))

    def test_survivors_stay_in_order(self) -> None:
        """Else the model sees the video in another order than it was shown."""
        self._hold(_ordered)
        for asked in self._budgets:
            if isinstance(asked.plan, FusionPlan):
                assert _increasing(asked.plan), f"{asked}: survivors {asked.plan.survivors}"

    def test_every_budget_is_met(self) -> None:
        """Else a comparison at equal budgets is none, and memory that was planned for may not do.

        Each budget from 1 to N, exactly. All N of an item of one frame if the strategy compares
        frames.
        """
        if not self._budgeted or not self.exact:
            pytest.skip("it has no keep_ratio that is met exactly")
        self._hold(_met)
        for asked in self._budgets:
            if isinstance(asked.plan, Exception):
                raise asked.plan
            assert asked.plan.num_kept == asked.count, (
                f"{asked}: {asked.plan.num_kept} tokens stay; {asked.count} were asked for"
            )

    def test_num_kept_is_the_truth(self) -> None:
        """Else prompts are laid out, and savings announced, for another number of tokens.

        ``num_kept`` may be None only where there is no ``keep_ratio`` that is met exactly.
        """
        self._hold(_counted)
        for asked in self._budgets:
            said = asked.strategy.num_kept(asked.grid)
            assert said == asked.count, f"{asked}: num_kept says {said}; it is {asked.count}"

    def test_every_token_is_accounted_for(self) -> None:
        """Else reports of what was merged and dropped are wrong: sizes and dropped sum to N."""
        self._hold(_accounted)

    # What comes out

    def test_what_comes_out_is_finite(self) -> None:
        """Else the model answers nonsense, for tokens that are equal or zero perhaps."""
        self._hold(_finite)

    def test_each_survivor_keeps_its_place(self) -> None:
        """Else the model sees a token where it was not: one row each, with its own coordinates."""
        self._hold(_placed)

    def test_keeping_everything_changes_nothing(self) -> None:
        """Else a strategy that is told to do nothing changes answers: not one bit may differ."""
        self._hold(_untouched)
        if not self._budgeted or not self.exact:
            return
        for dtype in DTYPES:
            tokens = tokens_of((4, 3, 5), dtype=dtype)
            out = _unchecked(self.make(keep_ratio=1.0), tokens)
            assert out.plan.is_identity, "not all tokens stay, though all were asked for"
            assert torch.equal(out.features.to(dtype), tokens.features), f"{dtype} changed"

    def test_deepstack_features_go_by_the_same_plan(self) -> None:
        """Else a model with DeepStack adds to a token what belongs to others.

        These features have a width of their own, and no column may depend on another.
        """
        self._hold(_columnwise)

    def test_fusing_keeps_the_dtype(self) -> None:
        """Else the model is given features of a dtype that its weights do not have."""
        for options in self._options(0.3, 1.0):
            for kind, dtype in itertools.product(FEW_KINDS, DTYPES):
                tokens = tokens_of((6, 4, 4), kind, dtype=dtype)
                strategy = self.make(**options)
                fused = strategy.fuse(strategy.plan(tokens), tokens.features).dtype
                assert fused == dtype, f"{dtype} in, {fused} out, with {options}, {kind}"

    def test_what_survives_can_be_trained_through(self) -> None:
        """Else nothing before the strategy learns: gradients are there, finite and not all zero."""
        plan = self._plan(tokens_of((5, 3, 4)))
        learning = tokens_of((5, 3, 4))
        learning.features.requires_grad_()
        with _global_seed(0):
            out = _unchecked(self.make(), learning)
        _same(out.plan, plan, "features that require gradients")
        assert out.features.requires_grad, "what comes out is cut off from the features"
        out.features.sum().backward()
        grad = learning.features.grad
        assert grad is not None
        assert grad.isfinite().all(), "gradients hold NaN or Inf"
        assert grad.abs().sum() > 0, "no gradient reaches the features"

    # What a plan depends on

    def test_a_plan_draws_no_global_random_numbers(self) -> None:
        """Else the same video gives another answer, and sampling after it goes another way."""
        for options in self._options(0.3):
            tokens = tokens_of((6, 4, 4))
            with _global_seed(0):
                before = _global_state()
                first = self.make(**options).plan(tokens)
                assert _global_state() == before, "a global generator was drawn from"
            _same(self._plan(tokens, options, seed=1), first, "another global seed")

    def test_a_plan_remembers_nothing(self) -> None:
        """Else an answer depends on which videos came before.

        The plan is that of a new strategy, whatever it planned before, and at each repetition.
        """
        grids = ((6, 4, 4), (5, 3, 4))
        others = [tokens_of(grid, "random", seed=8) for grid in grids]
        for options in self._options(0.3):
            plans = [self._plan(other, options) for other in others]
            for kind in (*FEW_KINDS, "identical"):
                tokens, used = tokens_of((6, 4, 4), kind), self.make(**options)
                first = self._plan(tokens, options)
                _same(_plan(used, tokens), first, "another new strategy")
                _same(_plan(used, tokens), first, "a repetition")
                for other, plan in zip(others, plans, strict=True):
                    _same(_plan(used, other), plan, "having planned before")
                _same(_plan(used, tokens), first, "having planned in between")

    def test_the_dtype_changes_no_selection(self) -> None:
        """Else results in bf16 or fp16 are not those that were measured in fp32, and vice versa.

        For equal values: scores should be computed in fp32, or in fp64 for fp64.
        """
        for options in self._options(0.3):
            for kind in FEW_KINDS:
                plan = self._plan(tokens_of((6, 4, 4), kind), options)
                for dtype in DTYPES[1:]:
                    tokens = tokens_of((6, 4, 4), kind, dtype=dtype)
                    _same(self._plan(tokens, options), plan, f"{dtype}, {kind}, {options}")
        # Rounding in fp16 is seen where many scores are close. So is that of fp32 against fp64,
        # which is nobody's fault.
        options = self._options(0.3)[-1]
        for kind in FEW_KINDS:
            plan = self._plan(tokens_of((8, 8, 8), kind), options)
            for dtype in (torch.bfloat16, torch.float16):
                tokens = tokens_of((8, 8, 8), kind, dtype=dtype)
                _same(self._plan(tokens, options), plan, f"{dtype}, {kind}, {options}")

    def test_strided_features_give_the_same_plan(self) -> None:
        """Else it depends on how a tensor lies in memory: adapters hand over slices and views."""
        for options in self._options(0.3):
            tokens = tokens_of((6, 4, 4), "scenes")
            plan = self._plan(tokens, options)
            x, saliency = tokens.features, tokens.saliency
            assert saliency is not None
            every_second = torch.stack([saliency, -saliency], 1)[:, 0]
            for strided in (torch.cat([x, -x], 1)[:, : x.shape[1]], x.T.contiguous().T):
                views = replace(tokens, features=strided, saliency=every_second)
                strategy = self.make(**options)
                found = _plan(strategy, views)
                _same(found, plan, f"strides {strided.stride()}")
                fused = strategy.fuse(found, strided)
                torch.testing.assert_close(fused, strategy.fuse(found, x), equal_nan=True)

    def test_inference_mode_changes_no_plan(self) -> None:
        """Else what was measured is not what ``generate`` does, which runs in inference mode."""
        for options in self._options(0.3):
            plan = self._plan(tokens_of((5, 3, 4)), options)
            with torch.inference_mode(), _global_seed(0):
                inside = _unchecked(self.make(**options), tokens_of((5, 3, 4)))
            _same(inside.plan, plan, "inference mode")

    def test_tokens_are_left_alone(self) -> None:
        """Else who uses the features afterwards, such as another strategy, finds them changed."""
        for options in self._options(0.3, 1.0):
            for kind in KINDS:
                tokens, before = tokens_of((6, 4, 4), kind), tokens_of((6, 4, 4), kind)
                _unchecked(self.make(**options), tokens)
                for name in ("features", "coords", "saliency", "text"):
                    value = getattr(tokens, name)
                    assert torch.equal(value, getattr(before, name)), f"{name} was written to"

    # What it costs, and what it says of itself

    def test_a_long_video_needs_no_square_matrix(self) -> None:
        """Else a long video runs out of memory: no tensor may have as many as N²/20 elements.

        N is 19 200. Compare tokens block by block, or within frames.
        """
        if isinstance(self._long, Exception):
            raise self._long

    def test_describe_makes_it_again(self) -> None:
        """Else a report or a saved configuration does not say what was run.

        ``describe()`` survives JSON and makes an equal strategy: by ``get_strategy`` where it is
        registered, by its class where it is not.
        """
        for options in self._options(0.3, 1.0):
            strategy = self.make(**options)
            described = json.loads(json.dumps(strategy.describe()))
            entry = default_registry().strategies.get(strategy.name)
            if entry is not None and entry.cls is type(strategy):
                again = get_strategy(described)
            else:
                assert described.pop(KEY) == strategy.name
                again = type(strategy)(**described)
            assert type(again) is type(strategy)
            assert again == strategy, f"{described} makes {again!r}, not {strategy!r}"

    def test_an_image_passes_what_compares_frames(self) -> None:
        """Else an image loses tokens to a strategy that has nothing to compare them with.

        A strategy says ``temporal = True`` if it compares frames.
        """
        if not getattr(self.make(), "temporal", False):
            pytest.skip("it does not compare frames")
        grid = (1, 3, 5)
        for options in self._options(0.01, 0.5, 1.0):
            for kind in KINDS:
                strategy, tokens = self.make(**options), tokens_of(grid, kind)
                out = _unchecked(strategy, tokens)
                case = f"with {options}, {kind}"
                assert out.plan.is_identity, f"not all of an image stays, {case}"
                assert torch.equal(out.features, tokens.features), f"features changed, {case}"
                assert strategy.num_kept(grid) == 15, f"num_kept is not all of an image, {case}"
                assert strategy.matching_flops(grid, WIDTH) == 0, f"nothing is compared, {case}"

    def test_fewer_tokens_than_places_can_be_planned(self) -> None:
        """Else a chain breaks off at this strategy, and nothing said that it has to come first.

        A strategy that needs every place of the grid says so: ``needs = frozenset({"grid"})``.
        """
        if self.make().needs_grid:
            pytest.skip("it needs every place of the grid")
        whole = tokens_of((6, 4, 4))
        index = torch.arange(0, whole.num_tokens, 3)
        few, full = whole.after(index, whole.features[index]), tokens_of((2, 4, 4))
        assert few.num_tokens == full.num_tokens
        for options in self._options(0.3, 1.0):
            strategy = self.make(**options)
            case = f"{few.num_tokens} tokens on grid {few.grid}, with {options}"
            try:
                plan = _plan(strategy, few)
                fused = strategy.fuse(plan, few.features)
            except Exception as error:
                raise AssertionError(
                    f"{type(error).__name__} for {case}: {error}; say that it needs the grid, or "
                    "take places from tokens.coords"
                ) from error
            assert fused.shape == (plan.num_kept, WIDTH)
            if "keep_ratio" in options and self.exact:
                expected = self._plan(full, options).num_kept
                assert plan.num_kept == expected, (
                    f"{plan.num_kept} stay of {case}; of a full grid of as many, {expected}"
                )

    # How the above is found out

    @property
    def _budgeted(self) -> bool:
        """Whether there is a ``keep_ratio`` to ask for."""
        budgeted: bool = self._once("budgeted", lambda: _has_budget(self.make()))
        return budgeted

    def _options(self, *ratios: float) -> list[dict[str, float]]:
        """The options to try: none, and each of these ratios where there is a ``keep_ratio``."""
        return [{}, *({"keep_ratio": ratio} for ratio in ratios if self._budgeted)]

    def _plan(
        self, tokens: VisualTokens, options: Mapping[str, float] | None = None, seed: int = 0
    ) -> FusionPlan:
        """The plan of a new strategy."""
        return _plan(self.make(**options or {}), tokens, seed)

    @property
    def _budgets(self) -> list[_Budget]:
        """Every budget of some grids, with its plan."""

        def plan_all() -> list[_Budget]:
            found = []
            for grid in [(1, 1, 1), (1, 5, 7), (4, 3, 3), (7, 2, 5), (16, 1, 1)]:
                n, tokens = math.prod(grid), tokens_of(grid)
                for count in range(1, n + 1):
                    strategy = self.make(keep_ratio=count / n)
                    try:
                        plan: FusionPlan | Exception = strategy.plan(tokens)
                    except Exception as error:
                        plan = error
                    found.append(_Budget(grid, _count(strategy, grid, count), strategy, plan))
            return found

        if not self._budgeted or not self.exact:
            return []
        budgets: list[_Budget] = self._once("budgets", plan_all)
        return budgets

    @property
    def _long(self) -> FusionPlan | Exception:
        """The plan for a long video, or the error that there was instead."""

        def plan_long() -> FusionPlan | Exception:
            tokens = tokens_of(LONG, "palette", width=8)
            strategy = self.make(**self._options(0.02)[-1])
            try:
                with _Limit(math.prod(LONG) ** 2 // 20):
                    return strategy.plan(tokens)
            except Exception as error:
                return error

        long: FusionPlan | Exception = self._once("long", plan_long)
        return long

    def _hold(self, judge: Judge) -> None:
        """Fail unless ``judge`` accepts what is made of every case that hypothesis tries."""

        def look_at_all() -> dict[Judge, Exception]:
            failed: dict[Judge, Exception] = {}

            def look(case: Case) -> None:
                made = _Made(self, case)
                for judge in JUDGES:
                    if judge not in failed:
                        try:
                            judge(made)
                        except Exception as error:
                            failed[judge] = error

            _for_all(look)
            return failed

        failed: dict[Judge, Exception] = self._once("failed", look_at_all)
        if judge in failed:
            # Again for this one alone, so that hypothesis looks for the smallest case and shows it.
            _for_all(lambda case: judge(_Made(self, case)))
            raise failed[judge]

    def _once(self, what: str, find: Callable[[], Any]) -> Any:
        """What ``find`` finds, for all methods of this class."""
        found = _found.setdefault(type(self), {})
        if what not in found:
            found[what] = find()
        return found[what]


def _for_all(test: Callable[[Case], None]) -> None:
    """Let hypothesis try ``test`` on cases."""

    # Made here, so that a profile that is loaded after this module counts.
    @settings(
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
    )
    @given(_cases())
    def search(case: Case) -> None:
        test(case)

    # What a search may miss in so few examples, and strategies fail most.
    for kind in ("zeros", "some zeros", "identical", "static"):
        search = example(Case((4, 3, 3), kind, 0, 0.5))(search)
    search()


def _has_budget(strategy: Strategy) -> bool:
    return "keep_ratio" in type(strategy).model_fields


def _count(strategy: Strategy, grid: Grid, count: int) -> int:
    """How many tokens stay where ``count`` are asked for."""
    temporal = getattr(strategy, "temporal", False)
    return math.prod(grid) if temporal and grid[0] == 1 else count


def _increasing(plan: FusionPlan) -> bool:
    return bool((plan.survivors.diff() > 0).all())


def _check(plan: FusionPlan, n: int) -> None:
    """Raise PlanError unless ``plan`` is valid but for the order of survivors."""
    if plan.survivors.ndim == 1 and not _increasing(plan) and plan.num_kept:
        order = plan.survivors.argsort()
        slots = torch.cat([order.argsort(), order.new_tensor([DROPPED])])
        plan = FusionPlan(plan.survivors[order], slots[plan.target])
    plan.check(n)


def _unchecked(strategy: Strategy, tokens: VisualTokens) -> Compressed:
    """``compress`` without its checks, so that it is the test of a fault that names it."""
    if type(strategy).compress is not Strategy.compress:
        return strategy.compress(tokens)
    plan = strategy.plan(tokens)
    return Compressed.of(tokens, plan, strategy.fuse(plan, tokens.features))


def _plan(strategy: Strategy, tokens: VisualTokens, seed: int = 0) -> FusionPlan:
    """A plan, made with the same global random numbers each time: they have a test of their own."""
    with _global_seed(seed):
        return strategy.plan(tokens)


def _same(found: FusionPlan, expected: FusionPlan, changed: str) -> None:
    pairs = [(found.survivors, expected.survivors), (found.target, expected.target)]
    assert all(torch.equal(*pair) for pair in pairs), f"{changed} makes another plan"


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Set every global generator of random numbers, and put it back afterwards."""
    ours, theirs = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)


def _global_state() -> tuple[Any, ...]:
    """Where the global generators are."""
    numpy: Any = np.random.get_state()
    return random.getstate(), *map(str, numpy), numpy[1].tolist(), torch.get_rng_state().tolist()


class _Limit(TorchDispatchMode):
    """Fails as soon as a tensor with as many as ``limit`` elements is made inside."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                # What an expanded view shows is not there.
                elements = leaf.untyped_storage().nbytes() // leaf.itemsize
                assert elements < self.limit, (
                    f"{func} makes a tensor {tuple(leaf.shape)} of {elements} elements; expected "
                    f"fewer than {self.limit}"
                )
        return out
