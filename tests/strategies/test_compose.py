"""Strategies one after the other."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenfuse
from models import model_of, one_video
from tokenfuse import FusionPlan, Strategy, VisualTokens, get_strategy
from tokenfuse.errors import ConfigError, PlanError, TokensError
from tokenfuse.strategies.compose import Compose
from tokenfuse.strategies.uniform import Uniform

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(grid, seed=0, width=8):
    torch.manual_seed(seed)
    n = math.prod(grid)
    return VisualTokens.from_grid(torch.randn(n, width), grid, saliency=torch.rand(n))


@given(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), st.integers(0, 99))
def test_a_chain_is_each_step_on_what_the_one_before_left(grid, seed):
    tokens = tokens_of(grid, seed)
    steps = ["ttf", "attention", {"strategy": "uniform", "keep_ratio": 0.7}]
    out = tokenfuse.get_strategy("compose", compose=steps).compress(tokens)
    features, coords, saliency = tokens.features, tokens.coords, tokens.saliency
    for step in map(get_strategy, steps):
        left = VisualTokens(features, grid, coords, saliency)
        plan = step.plan(left)
        features, coords = step.fuse(plan, features), plan.select(coords)
        saliency = plan.select(saliency)
    order = out.plan.prompt_order(coords[:, 0])
    assert torch.equal(out.features, features[order])
    assert torch.equal(out.coords, coords[order])
    out.plan.check(tokens.num_tokens)


def test_one_step_is_that_strategy():
    tokens = tokens_of((4, 3, 3))
    alone = tokenfuse.get_strategy("ttf", keep_ratio=0.4).compress(tokens)
    chain = tokenfuse.get_strategy("compose", compose=["ttf"], keep_ratio=0.4).compress(tokens)
    assert torch.equal(chain.features, alone.features)
    assert torch.equal(chain.plan.target, alone.plan.target)


@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.5, 0.9, 1.0])
def test_the_keep_ratio_is_of_all_tokens(ratio):
    tokens = tokens_of((4, 5, 3))
    chain = tokenfuse.get_strategy(
        "compose", compose=[{"strategy": "uniform", "keep_ratio": 0.9}, "attention"]
    )
    chain = get_strategy(chain, keep_ratio=ratio)
    asked = math.ceil(ratio * 60 - 1e-9)
    assert chain.compress(tokens).plan.num_kept == min(asked, 54)


@pytest.mark.parametrize("inner", [["evs", "uniform"], [{"compose": ["evs"]}]])
def test_a_chain_in_a_chain_needs_what_it_begins_with(inner):
    with pytest.raises(ConfigError, match="evs needs every place of the grid"):
        get_strategy({"compose": ["uniform", {"compose": inner}]})
    chain = get_strategy({"compose": [{"compose": inner}, "uniform"], "keep_ratio": 0.1})
    assert chain.needs_grid
    assert not get_strategy({"compose": ["uniform", "attention"]}).needs_grid
    assert chain.compress(tokens_of((3, 4, 5))).plan.num_kept == 6


def test_a_keep_ratio_without_a_last_step_that_takes_one_is_refused_in_a_chain_too():
    class EveryOther(Strategy):
        name = "every_other"

        def plan(self, tokens):
            return FusionPlan.from_survivors(
                torch.arange(0, tokens.num_tokens, 2), tokens.num_tokens
            )

    inner = Compose(compose=(get_strategy("uniform"), EveryOther()))
    with pytest.raises(ValueError, match="is for the last step, and every_other has none"):
        Compose(compose=(inner,), keep_ratio=0.2)


def test_a_chain_that_leads_back_to_itself_is_refused(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"compose: [uniform, '{two}']\n")
    two.write_text(f"compose: ['{one}']\n")
    with pytest.raises(ConfigError, match="leads back to itself") as caught:
        get_strategy(one)
    assert len(str(caught.value)) < 500
    assert get_strategy({"compose": ["uniform"]}).compose == (get_strategy("uniform"),)


def test_a_file_names_the_chain_by_its_key(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text("compose:\n- ttf-gentle\n- {strategy: attention, keep_ratio: 0.5}\n")
    chain = get_strategy(path)
    assert [step.name for step in chain.compose] == ["ttf", "attention"]
    assert chain.compose[0] == get_strategy("ttf-gentle")
    assert get_strategy(chain.describe()) == chain


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["attention", "evs"], "evs needs every place of the grid, so it can only come first"),
        (["atention"], 'did you mean "attention"'),
        ([], "at least 1 item"),
        ("ttf", "a list of strategies"),
        ([3], "is of type int"),
        ([{"strategy": "ttf", "positions": "contiguous"}], "set it at the top"),
        ([{"image": "attention"}], "by_modality chooses by modality, which only the top"),
        (
            ["attention", {"strategy": "attention", "block": 0}],
            "attention of different vision blocks",
        ),
    ],
)
def test_what_cannot_be_chained_is_refused(steps, message):
    with pytest.raises(ConfigError, match=message):
        tokenfuse.get_strategy("compose", compose=steps)


def test_a_strategy_of_every_place_refuses_a_rest():
    tokens = tokens_of((2, 3, 3))
    rest = tokens.after(torch.arange(5), tokens.features[:5])
    with pytest.raises(TokensError, match="do not fill grid"):
        tokenfuse.get_strategy("evs").plan(rest)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_a_step_that_compares_frames_leaves_an_image_to_the_next(ratio):
    image = tokens_of((1, 4, 5))
    chain = get_strategy({"compose": ["evs", "attention"], "keep_ratio": ratio})
    alone = tokenfuse.get_strategy("attention", keep_ratio=ratio).plan(image)
    assert torch.equal(chain.plan(image).target, alone.target)


@pytest.mark.parametrize("last", ["ttf", {"compose": ["dycoke"]}])
def test_a_chain_that_only_compares_frames_leaves_an_image_as_it_is(last):
    chain = get_strategy({"compose": [last], "keep_ratio": 0.1})
    assert chain.plan(tokens_of((1, 4, 5))).is_identity
    assert chain.plan(tokens_of((2, 2, 5))).num_kept == 2


def test_a_wrong_step_is_named_with_its_line(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text("compose:\n- ttf\n- strategy: attention\n  blok: 3\n")
    with pytest.raises(ConfigError) as caught:
        get_strategy(path)
    start = f'{path}, line 4: compose: step 2: unknown key blok of attention: did you mean "block"?'
    assert str(caught.value).startswith(start)


def test_a_step_acts_before_the_llm():
    class InDecoder(Uniform):
        name: ClassVar[str] = "in_decoder"
        stage: ClassVar[str] = "llm"

    with pytest.raises(ValueError, match="in_decoder acts at stage llm, and has neither"):
        Compose(compose=(InDecoder(),))


def test_a_chain_fuses_by_its_own_plans():
    with pytest.raises(PlanError, match="expected a ChainedPlan"):
        tokenfuse.get_strategy("compose", compose=["ttf"]).fuse(
            FusionPlan.identity(3), torch.ones(3, 2)
        )


def test_a_chain_compresses_a_model_s_prompt():
    model, inputs = model_of(), one_video()
    short = tokenfuse.compress(model, inputs, {"compose": ["ttf", "attention"], "keep_ratio": 0.25})
    assert short.report.tokens_after <= math.ceil(0.25 * short.report.tokens_before)
    assert short.report.strategy["compose"][1]["strategy"] == "attention"
    assert model.generate(**short, max_new_tokens=3).shape[1] == short["input_ids"].shape[1] + 3


class Unregistered(Uniform):
    """A step that no registry knows."""

    name: ClassVar[str] = "unregistered"


def test_a_step_of_the_caller_s_own_stays_when_the_chain_changes():
    own = Unregistered(keep_ratio=0.5)
    chain = tokenfuse.get_strategy("compose", compose=["ttf", own])
    changed = get_strategy(chain, keep_ratio=0.2)
    assert changed.compose[1] is own
    assert changed.compress(tokens_of((4, 5, 3))).plan.num_kept == 12


def test_a_chain_without_steps_says_what_is_missing():
    with pytest.raises(ConfigError, match="compose is missing; expected the strategies, first to"):
        get_strategy("compose")
