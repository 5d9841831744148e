"""What strategies share: their bases and how they and their results print."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenfuse import get_strategy
from tokenfuse.ops.select import budget
from tokenfuse.strategies import Attending, Attention, Needs, Scored
from tokenfuse.strategies.by_modality import ByModality
from tokenfuse.strategies.ttf import TTF
from tokenfuse.strategies.uniform import Uniform
from tokenfuse.testing.strategies import StrategyConformance, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Scores(Scored):
    """Keep the tokens whose first channel is greatest."""

    name: ClassVar[str] = "scores"

    def score(self, tokens):
        return tokens.features[:, 0].float()


class TestScores(StrategyConformance):
    def make(self, **options):
        return Scores(**options)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.floats(0.01, 1))
def test_the_greatest_scores_stay_and_the_lowest_index_of_equals(scores, ratio):
    n = len(scores)
    tokens = tokens_of((1, 1, n))
    tokens.features[:, 0] = torch.tensor(scores, dtype=torch.float32)
    best = sorted(range(n), key=lambda i: (-scores[i], i))[: budget(ratio, n)]
    plan = Scores(keep_ratio=ratio).plan(tokens)
    assert plan.survivors.tolist() == sorted(best)


def test_a_strategy_that_attends_says_which_attention_it_reads():
    class Mean(Attending):
        name: ClassVar[str] = "mean"
        needs: ClassVar = frozenset({"grid", "saliency"})
        query: ClassVar = "mean"

        def choose(self, tokens, count):
            raise NotImplementedError

    assert Mean().needed() == Needs(Attention(-1, "mean"))
    assert Mean(block=3).needed() == Needs(Attention(3, "mean"))


# How they print


@pytest.mark.parametrize(
    ("strategy", "printed"),
    [
        (TTF(), "ttf"),
        (TTF(threshold=0.9, anchor="first"), "ttf(threshold=0.9, anchor=first)"),
        (ByModality(video=TTF(window=5)), "by_modality(video=ttf(window=5))"),
        (
            get_strategy({"compose": ["ttf", {"strategy": "uniform", "keep_ratio": 0.25}]}),
            "compose(compose=[ttf, uniform(keep_ratio=0.25)])",
        ),
    ],
)
def test_a_strategy_prints_its_name_and_what_was_set(strategy, printed):
    assert str(strategy) == f"{strategy}" == printed


def test_what_is_left_prints_in_one_short_line():
    out = Uniform(keep_ratio=0.25).compress(tokens_of((4, 3, 6), width=32, dtype=torch.bfloat16))
    assert repr(out) == str(out) == "Compressed(18 of 72 kept, D=32, bf16)"


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ({"compose": ["uniform"]}, "ChainedPlan"),
        ({"strategy": "by_modality", "video": "uniform"}, "PartPlan"),
        ({"strategy": "llava_scissor", "keep_ratio": 0.5}, "ComponentPlan"),
        ({"strategy": "mame", "keep_ratio": 0.5}, "SoftPlan"),
        ("holitom", "CentredPlan"),
    ],
)
def test_plans_that_carry_more_print_as_short(strategy, kind):
    plan = get_strategy(strategy).plan(tokens_of((4, 3, 6)))
    assert repr(plan) == f"{kind}(36 of 72 kept)"
