"""The kit for strategies passes a good one, and names what is wrong with each bad one."""

import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import Field, PrivateAttr

import tokenfuse
from tokenfuse.ops.select import budget, top
from tokenfuse.plan import DROPPED, FusionPlan
from tokenfuse.strategies._base import Budgeted, Strategy
from tokenfuse.testing.strategies import DTYPES, KINDS, StrategyConformance, features_of, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [name for name in vars(StrategyConformance) if name.startswith("test_")]


class Good(Budgeted):
    """Keeps the longest vectors; of the others, some go into the survivor before, some nowhere."""

    name: ClassVar[str] = "good"

    keep_ratio: float = Field(0.5, gt=0, le=1)

    def score(self, tokens):
        return tokens.features.detach().double().square().sum(-1)

    def choose(self, tokens, count):
        index = torch.arange(tokens.num_tokens)
        survivors = top(self.score(tokens), count)
        before = torch.searchsorted(survivors, index, right=True) - 1
        target = torch.where(index % 2 == 0, before, DROPPED)
        return FusionPlan(survivors, target.scatter(0, survivors, index[:count]))


class Free(Strategy):
    """Without a budget: drops every third token."""

    name: ClassVar[str] = "free"

    def plan(self, tokens):
        n = tokens.num_tokens
        return FusionPlan.from_survivors(torch.arange(n)[torch.arange(n) % 3 < 2], n)


class SeveralFrames(Good):
    """Leaves images alone."""

    temporal: ClassVar[bool] = True


# Each of these is Good but for one thing, and named by the only method that may find it.


class Unordered(Good):
    caught_by: ClassVar[str] = "test_survivors_stay_in_order"

    def choose(self, tokens, count):
        plan = super().choose(tokens, count)
        target = torch.where(plan.target == DROPPED, DROPPED, count - 1 - plan.target)
        return FusionPlan(plan.survivors.flip(0), target)


class IntoEachOther(Good):
    caught_by: ClassVar[str] = "test_a_plan_is_valid"

    def choose(self, tokens, count):
        plan = super().choose(tokens, count)
        pair = plan.survivors[:2]
        return FusionPlan(plan.survivors, plan.target.scatter(0, pair, plan.target[pair].flip(0)))


class OneTooFew(Good):
    caught_by: ClassVar[str] = "test_every_budget_is_met"

    def choose(self, tokens, count):
        return super().choose(tokens, max(1, count - 1))


class OneTooFewOfSome(Good):
    """It takes every budget to see that."""

    caught_by: ClassVar[str] = "test_every_budget_is_met"

    def choose(self, tokens, count):
        return super().choose(tokens, count - (count == 29))


class Fails(Good):
    """For a budget that is not asked for elsewhere."""

    caught_by: ClassVar[str] = "test_every_budget_is_met"

    def choose(self, tokens, count):
        if (tokens.num_tokens, count) == (35, 17):
            raise IndexError("off by one")
        return super().choose(tokens, count)


class Miscounts(Good):
    caught_by: ClassVar[str] = "test_num_kept_is_the_truth"

    def num_kept(self, grid):
        return super().num_kept(grid) + 1


class DoesNotCount(Good):
    caught_by: ClassVar[str] = "test_num_kept_is_the_truth"

    def num_kept(self, grid):
        return None


class Forgets(Good):
    caught_by: ClassVar[str] = "test_every_token_is_accounted_for"

    def compress(self, tokens):
        out = super().compress(tokens)
        return replace(out, sizes=torch.ones_like(out.sizes))


class NotANumber(Good):
    """Where a survivor is nothing but zeros."""

    caught_by: ClassVar[str] = "test_what_comes_out_is_finite"

    def fuse(self, plan, x):
        fused = plan.fuse(x)
        norm = fused.norm(dim=-1, keepdim=True)
        return fused if plan.is_identity else fused * (norm / norm).to(x.dtype)


class NotANumberBeyondTheFeatures(Good):
    """Where DeepStack features have a width that it did not think of."""

    caught_by: ClassVar[str] = "test_what_comes_out_is_finite"

    def fuse(self, plan, x):
        fused = plan.fuse(x)
        return fused if x.shape[1] == 16 else fused * torch.nan


class Elsewhere(Good):
    caught_by: ClassVar[str] = "test_each_survivor_keeps_its_place"

    def compress(self, tokens):
        out = super().compress(tokens)
        return replace(out, coords=tokens.coords[: len(out.coords)])


class AlwaysDoesSomething(Good):
    caught_by: ClassVar[str] = "test_keeping_everything_changes_nothing"

    def fuse(self, plan, x):
        return plan.fuse(x) * 0.99


class AnotherPlanForDeepStack(Good):
    caught_by: ClassVar[str] = "test_deepstack_features_go_by_the_same_plan"

    def fuse(self, plan, x):
        return x[: plan.num_kept] if x.shape[1] < 8 else plan.fuse(x)


class Widens(Good):
    caught_by: ClassVar[str] = "test_fusing_keeps_the_dtype"

    def fuse(self, plan, x):
        return plan.fuse(x.float())


class CutsOff(Good):
    caught_by: ClassVar[str] = "test_what_survives_can_be_trained_through"

    def fuse(self, plan, x):
        return plan.fuse(x.detach())


class ByLot(Good):
    caught_by: ClassVar[str] = "test_a_plan_draws_no_global_random_numbers"

    def score(self, tokens):
        return torch.rand(tokens.num_tokens)


class ByASecretLot(Good):
    """Leaves the generator as it was, and depends on it nonetheless."""

    caught_by: ClassVar[str] = "test_a_plan_draws_no_global_random_numbers"

    def score(self, tokens):
        with torch.random.fork_rng(devices=[]):
            return torch.rand(tokens.num_tokens)


class DrawsForNothing(Good):
    """The next draw of the caller is another one."""

    caught_by: ClassVar[str] = "test_a_plan_draws_no_global_random_numbers"

    def score(self, tokens):
        torch.rand(1)
        return super().score(tokens)


class Remembers(Good):
    caught_by: ClassVar[str] = "test_a_plan_remembers_nothing"
    _mean: torch.Tensor | None = PrivateAttr(None)

    def score(self, tokens):
        mean = tokens.features.detach().double().mean(0)
        self._mean = mean if self._mean is None else 0.5 * (self._mean + mean)
        return (tokens.features.detach() - self._mean).square().sum(-1)


class RemembersSizes(Good):
    """What it made of the first tokens of a size serves for all of that size."""

    caught_by: ClassVar[str] = "test_a_plan_remembers_nothing"
    _scores: dict = PrivateAttr(default_factory=dict)

    def score(self, tokens):
        return self._scores.setdefault(tokens.num_tokens, super().score(tokens))


class RoundsScores(Good):
    caught_by: ClassVar[str] = "test_the_dtype_changes_no_selection"

    def score(self, tokens):
        x = tokens.features.detach()
        # fp32 and fp64 are wide enough here.
        return x.square().sum(-1) if x.itemsize == 2 else super().score(tokens)


class RoundsScoresOfHalves(Good):
    """In fp16 alone."""

    caught_by: ClassVar[str] = "test_the_dtype_changes_no_selection"

    def score(self, tokens):
        exact = super().score(tokens)
        return exact.half() if tokens.features.dtype == torch.float16 else exact


class NeedsRows(Good):
    caught_by: ClassVar[str] = "test_strided_features_give_the_same_plan"

    def score(self, tokens):
        return tokens.features.detach().view(-1).double().view(tokens.num_tokens, -1).norm(dim=-1)


class AnotherInInferenceMode(Good):
    caught_by: ClassVar[str] = "test_inference_mode_changes_no_plan"

    def score(self, tokens):
        return super().score(tokens) * (-1 if torch.is_inference_mode_enabled() else 1)


class WritesIntoTokens(Good):
    caught_by: ClassVar[str] = "test_tokens_are_left_alone"

    def choose(self, tokens, count):
        tokens.saliency.clamp_(min=0.5)
        return super().choose(tokens, count)


class Square(Good):
    caught_by: ClassVar[str] = "test_a_long_video_needs_no_square_matrix"

    def choose(self, tokens, count):
        index = torch.arange(tokens.num_tokens)
        assert (index[:, None] >= index).any()
        return super().choose(tokens, count)


class KeepsOptionsToItself(Good):
    caught_by: ClassVar[str] = "test_describe_makes_it_again"

    def describe(self):
        return {"strategy": self.name}


class NeedsTheGrid(Good):
    """And does not say so."""

    caught_by: ClassVar[str] = "test_fewer_tokens_than_places_can_be_planned"

    def score(self, tokens):
        t, h, w = tokens.grid
        frames = tokens.features.detach().double().view(t, h * w, -1)
        return frames.square().sum(-1).flatten()


class CountsPlaces(Good):
    """And takes its budget of them, not of the tokens."""

    caught_by: ClassVar[str] = "test_fewer_tokens_than_places_can_be_planned"

    def plan(self, tokens):
        count = self.num_kept(tokens.grid)
        if count >= tokens.num_tokens:
            return FusionPlan.identity(tokens.num_tokens)
        return self.choose(tokens, count)


class ComparesOneFrame(SeveralFrames):
    caught_by: ClassVar[str] = "test_an_image_passes_what_compares_frames"

    def matching_flops(self, grid, width):
        return grid[0] * width


BAD = [cls for cls in list(globals().values()) if "caught_by" in getattr(cls, "__dict__", {})]


def kit(cls, **members):
    members = {"make": lambda self, **options: cls(**options), **members}
    return type(f"Test{cls.__name__}", (StrategyConformance,), members)()


def outcomes(tests):
    """What each method raises, by its name; None where it passes or does not apply."""
    found = {}
    for name in METHODS:
        try:
            getattr(tests, name)()
        except (Exception, pytest.skip.Exception) as error:
            found[name] = error
    return found


def failures(tests):
    return {n: e for n, e in outcomes(tests).items() if not isinstance(e, pytest.skip.Exception)}


@pytest.mark.parametrize(
    ("cls", "skipped"),
    [
        (Good, {"test_an_image_passes_what_compares_frames"}),
        (SeveralFrames, set()),
        (Free, {"test_an_image_passes_what_compares_frames", "test_every_budget_is_met"}),
    ],
)
def test_a_good_strategy_passes(cls, skipped):
    found = outcomes(kit(cls))
    assert found.keys() == skipped, found
    assert all(isinstance(error, pytest.skip.Exception) for error in found.values())


@pytest.mark.parametrize("cls", BAD)
def test_a_bad_strategy_is_caught_by_name(cls):
    found = failures(kit(cls))
    assert list(found) == [cls.caught_by], found


def test_every_method_catches_something():
    assert {cls.caught_by for cls in BAD} == set(METHODS)


def test_what_keeps_too_much_of_an_image_fails_by_more_than_one_name():
    class TreatsImagesToo(SeveralFrames):
        def _passes(self, grid):
            return False

    found = failures(kit(TreatsImagesToo))
    assert found.keys() == {
        "test_an_image_passes_what_compares_frames",
        "test_every_budget_is_met",
        "test_num_kept_is_the_truth",
    }


def test_a_chain_may_keep_fewer():
    assert failures(kit(OneTooFew, exact=False)).keys() == {"test_num_kept_is_the_truth"}


def test_the_smallest_case_is_shown():
    with pytest.raises(AssertionError, match="hold NaN") as caught:
        kit(NotANumber).test_what_comes_out_is_finite()
    note = "\n".join(caught.value.__notes__)
    assert "kind='zeros'" in note or "kind='some zeros'" in note
    assert "seed=0" in note


def test_each_class_is_found_out_for_itself():
    bad = kit(NotANumber)
    mended = type("TestMended", (type(bad),), {"make": lambda self, **options: Good(**options)})()
    with pytest.raises(AssertionError):
        bad.test_what_comes_out_is_finite()
    mended.test_what_comes_out_is_finite()


def test_a_class_without_make_says_so():
    with pytest.raises(NotImplementedError, match=r"no method make\(self, \*\*options\)"):
        StrategyConformance().test_a_plan_is_valid()


# What authors make tokens with


@pytest.mark.parametrize("kind", KINDS)
def test_equal_arguments_make_equal_tokens_whose_values_every_dtype_holds(kind):
    grid = (3, 2, 5)
    tokens = tokens_of(grid, kind, seed=4, width=6)
    assert tokens.features.shape == (30, 6)
    assert torch.equal(tokens.features, features_of(grid, kind, seed=4, width=6))
    for dtype in DTYPES:
        other = tokens_of(grid, kind, seed=4, width=6, dtype=dtype)
        for name in ("features", "saliency", "text"):
            assert getattr(other, name).dtype == dtype
            assert torch.equal(getattr(other, name).float(), getattr(tokens, name))


def test_nothing_else_imports_the_test_suites():
    source = Path(tokenfuse.__file__).parent
    for path in source.rglob("*.py"):
        if source / "testing" not in path.parents:
            found = re.findall(
                r"^\s*(?:from|import) (?:tokenfuse\.testing|pytest|hypothesis)\b.*",
                path.read_text("utf-8"),
                re.MULTILINE,
            )
            assert not found, path


def test_budgets_of_good_are_those_of_the_library():
    assert Good(keep_ratio=0.55).plan(tokens_of((4, 5, 5))).num_kept == budget(0.55, 100) == 55
