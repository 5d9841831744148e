"""What every registered strategy holds to, those of installed plugins included."""

from typing import ClassVar

import pytest
import torch

import tokenfuse
from models import frames, model_of, prompt, user
from tokenfuse import FusionPlan, get_strategy
from tokenfuse.errors import ConfigError
from tokenfuse.registry import default_registry
from tokenfuse.strategies._base import Budgeted
from tokenfuse.testing.strategies import StrategyConformance, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")

# What a strategy needs that cannot be made from its name alone.
OPTIONS = {
    "by_modality": {"video": {"compose": ["ttf", "attention"]}, "image": "visionzip"},
    "compose": {"compose": ["ttf", "attention"]},
}
NAMES = sorted(
    name for name, entry in default_registry().strategies.items() if entry.cls.stage == "pre_llm"
)
BUDGETED = [
    name for name in NAMES if "keep_ratio" in default_registry().strategy(name).model_fields
]
TEMPORAL = [name for name in NAMES if default_registry().strategy(name).temporal]

every = pytest.mark.parametrize("name", NAMES)


def make(name, **options):
    return get_strategy({"strategy": name, **OPTIONS.get(name, {}), **options})


def kit(name, **members):
    """The kit's class for one strategy."""
    members = {"make": lambda self, **options: make(name, **options), **members}
    return type(f"Test_{name}", (StrategyConformance,), members)


for name in NAMES:
    # Chains leave fewer where their first steps do.
    globals()[f"Test_{name}"] = kit(name, exact=name != "compose")


def test_a_chain_of_one_exact_step_is_exact():
    chain = kit("chain", make=lambda self, **o: make("compose", compose=["uniform"], **o))()
    chain.test_keeping_everything_changes_nothing()
    chain.test_every_budget_is_met()
    # Its last step knows, but a chain does not ask it.
    assert chain.make(keep_ratio=0.5).num_kept((2, 3, 4)) is None


def test_the_built_in_strategies_that_compare_frames_only():
    built_in = {
        name for name in TEMPORAL if default_registry().strategies[name].distribution == "tokenfuse"
    }
    assert built_in == {"dycoke", "evs", "frame_subsample", "ttf"}


@every
@pytest.mark.parametrize("positions", ["keep", "contiguous"])
def test_a_model_s_batch_is_planned_as_each_prompt_alone(name, positions):
    model = model_of()
    strategy = make(name, **{"keep_ratio": 0.4} if name in BUDGETED else {})
    if strategy.cuts():
        pytest.skip("it acts inside the LLM too, which compress does not see")
    videos, asked = [frames(5, 2), frames(6, 4)], ["What color is it?", "How many?"]
    texts = [user("video", question) for question in asked]
    both = tokenfuse.compress(model, prompt(texts, videos=videos), strategy, positions=positions)
    length = both["input_ids"].shape[1]
    for row, (text, video) in enumerate(zip(texts, videos, strict=True)):
        alone = tokenfuse.compress(
            model, prompt([text], videos=[video]), strategy, positions=positions
        )
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
