"""What a strategy returns is checked where it enters, by name, and what it gets stays as it is."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import models
import tokenfuse
from tokenfuse import FusionPlan, Strategy, VisualTokens, get_strategy, hookimpl
from tokenfuse.errors import ConfigError, PlanError, TokensError
from tokenfuse.ops.select import budget
from tokenfuse.registry import Registry, default_registry
from tokenfuse.strategies import _base

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(grid=(4, 3, 3), width=16, dtype=torch.float32, scale=1.0):
    rng = torch.Generator().manual_seed(0)
    still = torch.randn(1, *grid[1:], width, generator=rng)
    x = (still + 0.4 * torch.randn(*grid, width, generator=rng)) * scale
    n = grid[0] * grid[1] * grid[2]
    return VisualTokens.from_grid(
        x.to(dtype),
        grid,
        saliency=torch.rand(n, generator=rng),
        text=torch.randn(5, width, generator=rng),
    )


class Lying(Strategy):
    """Returns what its fault says."""

    name: ClassVar[str] = "lying"
    fault: str

    def plan(self, tokens):
        if self.fault == "none":
            return None
        if self.fault == "writes":
            tokens.features.mul_(2)
        if self.fault == "too few":
            return FusionPlan.identity(tokens.num_tokens - 1)
        return FusionPlan.from_survivors(torch.arange(3), tokens.num_tokens)

    def fuse(self, plan, x):
        fused = plan.fuse(x)
        if self.fault == "writes later":
            x.zero_()
        faults = {"rows": fused[:-1], "double": fused.double(), "three": fused[None], "text": "x"}
        return faults.get(self.fault, fused)


FAULTS = {
    "none": "returned a NoneType as its plan; expected a FusionPlan",
    "writes": "wrote into the tokens",
    "too few": "expected .M,. and .36,.",
    "rows": r"fused into torch.float32 .2, 16. on cpu; expected a tensor torch.float32 .3, 16.",
    "double": "fused into torch.float64",
    "three": "fused into torch.float32 .1, 3, 16.",
    "text": "fused into str",
    "writes later": "wrote into the features",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_strategy_that_lies_is_named_on_bare_tensors(fault):
    with pytest.raises(PlanError, match=f"strategy lying.*{FAULTS[fault]}"):
        Lying(fault=fault).compress(tokens_of())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_strategy_that_lies_is_named_under_attach(fault):
    model = models.build()
    before = model.model.rope_deltas
    with (
        tokenfuse.attach(model, Lying(fault=fault)),
        pytest.raises(PlanError, match="strategy lying"),
    ):
        model.generate(**models.one_video(), max_new_tokens=1)
    assert model.model.rope_deltas is before


def test_features_that_are_no_longer_finite_are_refused():
    class Nan(Lying):
        name: ClassVar[str] = "nan"

        def fuse(self, plan, x):
            return plan.fuse(x) * float("nan")

    with pytest.raises(PlanError, match="strategy nan fused finite features into NaN or Inf"):
        tokenfuse.compress(models.build(), models.one_video(), Nan(fault=""))


class Writing:
    """A plug-in that changes what it is told of."""

    def __init__(self, what):
        self.what = what

    @hookimpl
    def tokenfuse_planned(self, tokens, plan, strategy):
        {"plan": plan.survivors, "tokens": tokens.features}[self.what].zero_()


@pytest.mark.parametrize("what", ["plan", "tokens"])
def test_an_observer_cannot_change_what_it_sees(what):
    registry = Registry([Writing(what)])
    with pytest.raises(PlanError, match="tokenfuse_planned wrote into"):
        tokenfuse.compress(models.build(), models.one_video(), "uniform", registry=registry)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("saliency", float("nan"), "saliency holds NaN; expected finite values of 0 or more"),
        ("saliency", float("inf"), "saliency holds Inf"),
        ("saliency", -1.0, "saliency holds negative values"),
        ("text", float("nan"), "text holds NaN; expected finite values"),
        ("text", float("inf"), "text holds Inf"),
    ],
)
def test_saliency_and_text_are_held_to_what_features_are(field, value, said):
    tokens = tokens_of()
    wrong = getattr(tokens, field).clone()
    wrong[1] = value
    given = {"saliency": tokens.saliency, "text": tokens.text, field: wrong}
    with pytest.raises(TokensError, match=said):
        VisualTokens.from_grid(tokens.features, tokens.grid, **given)


NAMES = [
    name
    for name, entry in tokenfuse.list_strategies().items()
    if name not in ("compose", "by_modality")
    and entry.cls.stage == "pre_llm"
    and "keep_ratio" in entry.cls.model_fields
]


def configured(name):
    chosen = default_registry().strategy(name)
    options = {"keep_ratio": 0.5} if "keep_ratio" in chosen.model_fields else {}
    return get_strategy(name, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, dtype):
    strategy = configured(name)
    # Long vectors overflow in fp16 products.
    for tokens in (tokens_of(), tokens_of((3, 2, 2), scale=900.0)):
        outside = strategy.compress(tokens)
        with torch.autocast("cpu", dtype):
            inside = strategy.compress(tokens)
            alone = strategy.plan(tokens)
        assert torch.equal(inside.plan.survivors, outside.plan.survivors)
        assert torch.equal(inside.plan.target, outside.plan.target)
        assert torch.equal(alone.survivors, outside.plan.survivors)
        assert torch.equal(inside.features, outside.features)


def test_autocast_changes_no_plan_under_attach():
    model, inputs = models.build(), models.one_video()
    encoded = tokenfuse.compress(model, inputs, "ttf", keep_ratio=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = tokenfuse.compress(model, inputs, "ttf", keep_ratio=0.4)
    # The tower's features are those of autocast; the budget holds all the same, and the plan is the
    # one that these features get outside.
    assert inside.report.tokens_after == encoded.report.tokens_after
    seen = []

    class Watching:
        @hookimpl
        def tokenfuse_planned(self, tokens, plan, strategy):
            seen.append((tokens, plan, strategy))

    with torch.autocast("cpu", torch.bfloat16):
        tokenfuse.compress(model, inputs, "ttf", keep_ratio=0.4, registry=Registry([Watching()]))
    ((tokens, plan, strategy),) = seen
    outside = strategy.plan(tokens)
    assert torch.equal(plan.survivors, outside.survivors)
    assert torch.equal(plan.target, outside.target)


def test_features_may_be_given_by_name():
    tokens, strategy = tokens_of(), get_strategy("ttf", keep_ratio=0.5)
    plan = strategy.plan(tokens=tokens)
    assert torch.equal(strategy.fuse(plan, x=tokens.features), strategy.fuse(plan, tokens.features))


@pytest.mark.parametrize("name", ["llava_scissor", "mame"])
def test_what_takes_long_says_so_before_it_begins(name, monkeypatch):
    monkeypatch.setattr(_base, "MANY", 36)
    with pytest.warns(_base.SlowWarning, match=f"{name} compares all pairs of 36 tokens"):
        get_strategy(name, keep_ratio=0.5).plan(tokens_of())


@pytest.mark.parametrize("keep_ratio", [1e-9, 1e-3, 0.999999, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_the_budget_are_met(name, keep_ratio):
    plan = get_strategy(name, keep_ratio=keep_ratio).compress(tokens_of((3, 2, 2))).plan
    assert plan.num_kept == budget(keep_ratio, 12)


def test_features_without_width_are_refused():
    with pytest.raises(TokensError, match="features have width 0"):
        VisualTokens.from_grid(torch.empty(4, 0), (1, 2, 2))


@pytest.mark.parametrize(
    "option",
    [{"strategy": "prunevid", "neighbours": 2**70}, {"strategy": "mame", "threshold": 1e300}],
)
def test_options_beyond_use_are_refused(option):
    with pytest.raises(ConfigError, match="should be less than"):
        get_strategy(option)


@pytest.mark.parametrize("name", NAMES)
def test_features_near_the_largest_number_stay_finite(name):
    tokens = tokens_of((3, 2, 2), dtype=torch.float16, scale=1.0)
    large = tokens.features / tokens.features.abs().max() * torch.finfo(torch.float16).max
    tokens = VisualTokens.from_grid(
        large, (3, 2, 2), saliency=tokens.saliency, text=tokens.text.float()
    )
    out = configured(name).compress(tokens)
    assert out.features.isfinite().all()
    assert out.features.dtype == torch.float16
