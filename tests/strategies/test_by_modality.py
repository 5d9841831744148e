"""A strategy for videos and another one for images."""

import json
import math
import re
from typing import ClassVar

import pytest
import torch

import tokenfuse
from models import model_of, one_video
from tokenfuse import FusionPlan, Strategy, VisualTokens, get_strategy, hookimpl
from tokenfuse.config import Configuration, get_configuration
from tokenfuse.errors import ConfigError, PlanError
from tokenfuse.registry import Registry
from tokenfuse.strategies._base import Attention, Needs
from tokenfuse.strategies.by_modality import ByModality, PartPlan
from tokenfuse.strategies.evs import EVS
from tokenfuse.strategies.holitom import CentredPlan, HoliTom
from tokenfuse.strategies.ttf import TTF
from tokenfuse.strategies.uniform import Uniform
from tokenfuse.strategies.visionzip import VisionZip

pytestmark = pytest.mark.usefixtures("one_thread")

VIDEO, IMAGE = (4, 3, 4), (1, 4, 5)


def tokens_of(grid, seed=0, width=8):
    rng = torch.Generator().manual_seed(seed)
    n = math.prod(grid)
    x = torch.randn(n, width, generator=rng)
    return VisualTokens.from_grid(x, grid, saliency=torch.rand(n, generator=rng))


# Forms of a configuration


@pytest.mark.parametrize(
    "source",
    [
        {"video": "ttf", "image": {"strategy": "visionzip", "keep_ratio": 0.5}},
        {"image": VisionZip(keep_ratio=0.5), "video": TTF()},
        {"strategy": "by_modality", "video": "ttf", "image": VisionZip(keep_ratio=0.5)},
        ByModality(video=TTF(), image=VisionZip(keep_ratio=0.5)),
    ],
)
def test_it_loads_from_names_mappings_and_strategies(source):
    assert get_strategy(source) == ByModality(video=TTF(), image=VisionZip(keep_ratio=0.5))


def test_a_file_names_it_by_its_keys(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("strategy: evs\nkeep_ratio: 0.3\n")
    path = tmp_path / "both.yaml"
    path.write_text(f"video: {other}\nimage: {{strategy: visionzip, keep_ratio: 0.5}}\n")
    found = get_strategy(path)
    assert found == ByModality(video=EVS(keep_ratio=0.3), image=VisionZip(keep_ratio=0.5))
    assert get_strategy(path, video="ttf-gentle").video == TTF(threshold=0.9)
    assert get_strategy(found, image=None) == ByModality(video=EVS(keep_ratio=0.3))
    path.write_text("image: uniform\npositions: contiguous\n")
    expected = Configuration(ByModality(image=Uniform()), positions="contiguous")
    assert get_configuration(path) == expected


@pytest.mark.parametrize(
    "parts",
    [
        {"video": "ttf-third"},
        {"image": {"strategy": "uniform", "keep_ratio": 0.2}, "positions": "contiguous"},
        {"video": {"compose": ["ttf", "attention"], "keep_ratio": 0.2}, "image": "visionzip"},
    ],
)
def test_it_survives_its_description(parts):
    whole = get_configuration(parts)
    described = json.loads(json.dumps(whole.describe()))
    assert described["strategy"] == "by_modality"
    assert get_configuration(described) == whole


def test_parts_may_be_of_another_registry():
    class Mine(Uniform):
        name: ClassVar[str] = "mine"

    class Plugin:
        @hookimpl
        def tokenfuse_register_strategies(self, register):
            register(Mine)

    found = Registry([Plugin()], installed=False)
    assert get_strategy({"image": "mine"}, registry=found).image == Mine()
    with pytest.raises(ConfigError, match='image: no strategy or preset is called "mine"'):
        get_strategy({"image": "mine"})
    # Registered nowhere, and still the same after an override.
    own = ByModality(image=Mine(keep_ratio=0.3))
    assert get_strategy(own, video="ttf").image is own.image


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "visionzp"}, '^image: no strategy or preset .* did you mean "visionzip"'),
        ({"video": {"strategy": "ttf", "windw": 3}}, "^video: unknown key windw of ttf: did you"),
        ({"video": {"strategy": "ttf", "window": 4}}, "^video: window: 4 is wrong: a window has"),
        ({"video": {"threshold": 0.7}}, "^video: a configuration names its strategy; got the keys"),
        ({"video": ["ttf"]}, r"^video: \['ttf'\] is of type list; expected a strategy's name"),
        ({"video": "no.yaml"}, r"^video: configuration no\.yaml is not a file"),
        ({"video": {"compose": ["ttf", {"strategy": 3}]}}, "^video: compose: step 2: strategy: 3"),
        (
            {"video": "ttf", "keep_ratio": 0.5},
            "unknown key keep_ratio of by_modality: valid: image, vi",
        ),
        ({"video": "ttf", "img": "uniform"}, "unknown key img of by_modality"),
        ({"video": None}, "no strategy for videos nor for images; expected one or both"),
        ({"strategy": "by_modality"}, "no strategy for videos nor for images; expected one"),
        (
            {"image": {"strategy": "uniform", "positions": "contiguous"}},
            "uniform sets positions; set it at the top",
        ),
        ({"image": {"video": "ttf"}}, "by_modality chooses by modality, which only the top"),
        ({"image": {"compose": [{"video": "ttf"}]}}, "by_modality chooses by modality, which only"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_key(options, message):
    with pytest.raises(ConfigError, match=message):
        get_strategy(options)


def test_every_wrong_part_is_named_with_the_line_of_its_own_key(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(
        "video:\n  strategy: ttf\n  thresold: 0.7\n"
        "image:\n  compose:\n  - visionzip\n  - strategy: uniform\n    keep_ratio: 7\n"
    )
    with pytest.raises(ConfigError) as caught:
        get_strategy(path)
    found = re.findall(
        rf"{re.escape(str(path))}, line (\d): ([^;]*?)(?:: did|: it)", str(caught.value)
    )
    assert found == [
        ("3", "video: unknown key thresold of ttf"),
        ("8", "image: compose: step 2: keep_ratio: 7 is wrong"),
    ]
    with pytest.raises(ConfigError) as caught:
        get_strategy(path, image={"strategy": "uniform", "keep_ratio": 7})
    assert "; image: keep_ratio: 7 is wrong" in str(caught.value), "a file is not to blame for it"


def test_a_wrong_file_is_named_with_the_file_that_names_it(tmp_path):
    path, other = tmp_path / "both.yaml", tmp_path / "other.yaml"
    path.write_text(f"image: uniform\nvideo: {other}\n")
    for text, problem in [
        ("strategy: ttf\nwindow: 4\n", f"{other}, line 2: window: 4 is wrong"),
        ("- ttf\n", f"{other} holds a list"),
        ("strategy: [\n", f"{other}, line 2 is not valid YAML"),
        ("window: 3\n", f"{other}: a configuration names its strategy"),
    ]:
        other.write_text(text)
        with pytest.raises(ConfigError) as caught:
            get_strategy(path)
        assert str(caught.value).startswith(f"{path}, line 2: video: {problem}")


def test_files_that_lead_back_to_themselves_are_refused(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(f"image: uniform\nvideo: {path}\n")
    with pytest.raises(ConfigError, match=r"line 2: video: .* leads back to itself") as caught:
        get_strategy(path)
    assert len(str(caught.value)) < 500
    assert get_strategy({"video": "ttf"}).video == TTF()


def test_a_part_acts_before_the_llm():
    class InDecoder(Uniform):
        name: ClassVar[str] = "in_decoder"
        stage: ClassVar[str] = "llm"

    with pytest.raises(ValueError, match="in_decoder acts at stage llm, and has neither"):
        ByModality(image=InDecoder())


# What it does


def test_the_engine_finds_the_strategy_of_each_modality():
    whole = ByModality(video=TTF())
    assert whole.for_modality("video") is whole.video
    assert whole.for_modality("image") is None
    alone = TTF()
    assert alone.for_modality("video") is alone.for_modality("image") is alone


@pytest.mark.parametrize("grid", [VIDEO, IMAGE])
def test_one_frame_is_an_image_and_more_are_a_video(grid):
    whole = ByModality(video=TTF(keep_ratio=0.4), image=VisionZip(keep_ratio=0.3))
    part = whole.image if grid is IMAGE else whole.video
    tokens = tokens_of(grid)
    out, alone = whole.compress(tokens), part.compress(tokens)
    assert torch.equal(out.plan.target, alone.plan.target)
    assert torch.equal(out.plan.survivors, alone.plan.survivors)
    assert torch.equal(out.features, alone.features)
    assert whole.num_kept(grid) == part.num_kept(grid) == out.plan.num_kept
    assert whole.matching_flops(grid, 8) == part.matching_flops(grid, 8)


@pytest.mark.parametrize(("left_out", "grid"), [("video", VIDEO), ("image", IMAGE)])
def test_a_modality_that_is_left_out_is_left_as_it_is(left_out, grid):
    parts = {"video": EVS(keep_ratio=0.1), "image": Uniform(keep_ratio=0.1)}
    whole = ByModality(**parts | {left_out: None})
    tokens = tokens_of(grid)
    out = whole.compress(tokens)
    assert out.plan.is_identity
    assert torch.equal(out.features, tokens.features)
    assert whole.num_kept(grid) == tokens.num_tokens
    assert whole.matching_flops(grid, 8) == 0
    other = tokens_of(IMAGE if grid is VIDEO else VIDEO)
    assert whole.plan(other).num_kept == math.ceil(other.num_tokens / 10)


def test_a_part_fuses_by_the_plan_that_it_made():
    part = HoliTom(keep_ratio=0.3, contextual=0.5)
    whole = ByModality(video=part)
    tokens = tokens_of(VIDEO)
    plan = whole.plan(tokens)
    assert isinstance(plan, PartPlan)
    assert isinstance(plan.made, CentredPlan)
    deep = torch.randn(tokens.num_tokens, 5)
    assert torch.equal(whole.fuse(plan, deep), part.fuse(part.plan(tokens), deep))
    assert not torch.equal(whole.fuse(plan, deep), FusionPlan.fuse(plan, deep))


def test_a_chain_is_a_part_like_any_other():
    chain = get_strategy({"compose": ["ttf", "attention"], "keep_ratio": 0.2})
    whole = ByModality(video=chain, image=chain)
    for grid in (VIDEO, IMAGE):
        tokens = tokens_of(grid)
        out, alone = whole.compress(tokens), chain.compress(tokens)
        assert torch.equal(out.features, alone.features)
        assert torch.equal(out.sizes, alone.sizes)


def test_a_plan_of_another_strategy_is_refused_and_the_identity_is_not():
    whole, x = ByModality(video=TTF()), torch.randn(3, 2)
    assert torch.equal(whole.fuse(FusionPlan.identity(3), x), x)
    with pytest.raises(PlanError, match="got a FusionPlan, expected a PartPlan"):
        whole.fuse(FusionPlan.from_survivors(torch.tensor([1]), 3), x)


def test_it_wants_what_its_parts_want():
    class Query(Strategy):
        name: ClassVar[str] = "query"
        needs: ClassVar = frozenset({"text"})

        def plan(self, tokens):
            return FusionPlan.identity(tokens.num_tokens)

    assert ByModality(video=TTF()).needed() == Needs()
    assert ByModality(video=Query()).needed() == Needs(text=True)
    both = {"video": {"strategy": "attention", "block": 0}, "image": VisionZip()}
    assert get_strategy(both).needed() == Needs(Attention(0))
    assert ByModality(video=Query(), image=HoliTom(block=1)).needed() == Needs(Attention(1), True)


def test_it_needs_the_grid_where_a_part_does():
    assert ByModality(video=get_strategy("evs")).needs_grid
    assert ByModality(video=get_strategy("uniform"), image=VisionZip()).needs_grid
    assert not ByModality(video=get_strategy("uniform")).needs_grid


def test_it_compresses_a_model_s_prompt():
    model, inputs = model_of(), one_video()
    whole = {"video": {"strategy": "uniform", "keep_ratio": 0.25}, "image": "visionzip"}
    short = tokenfuse.compress(model, inputs, whole)
    alone = tokenfuse.compress(model, inputs, whole["video"])
    assert torch.equal(short["input_ids"], alone["input_ids"])
    assert short.report.strategy["video"]["keep_ratio"] == 0.25
    with tokenfuse.attach(model, whole) as session:
        model.generate(**inputs, max_new_tokens=2)
    assert session.report.tokens_after == short.report.tokens_after
