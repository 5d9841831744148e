"""LLaVA: images, 1-D rope, and the attention of a class token."""

import functools

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import tokenfuse
from tokenfuse.adapters.llava import Llava
from tokenfuse.errors import PromptError
from tokenfuse.ops.select import top
from tokenfuse.registry import default_registry
from tokenfuse.strategies._base import Attention, Needs

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE, PAD, SIDE, PATCHES = 7, 0, 32, 16


@functools.cache
def model_of(tower="clip", attention="sdpa", select="default"):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision)
        if tower == "clip"
        else SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=PAD,
            initializer_range=0.3,
        ),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_select_strategy=select if tower == "clip" else "full",
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            # At the usual scale an untrained map is flat.
            parameter.normal_(std=0.3)
    model.generation_config = GenerationConfig(pad_token_id=PAD, do_sample=False)
    return model


def prompt(*rows, seed=0):
    """Inputs of rows of text ids, in which IMAGE stands for an image's block; left-padded."""
    ids = [[i for t in row for i in ([t] * PATCHES if t == IMAGE else [t])] for row in rows]
    longest = max(map(len, ids))
    images = sum(row.count(IMAGE) for row in rows)
    rng = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in ids]),
        "pixel_values": torch.randn(images, 3, SIDE, SIDE, generator=rng),
    }


PROMPTS = {
    "one": prompt([1, IMAGE, 9, 10, 11]),
    "two images": prompt([1, IMAGE, 9, IMAGE, 12, 13], seed=1),
    "batch": prompt([1, IMAGE, 9, 10], [1, 20, IMAGE, 21, IMAGE, 22, 23], seed=2),
}


ONE_WITH_CLASS = {
    "input_ids": torch.tensor([[1, *[IMAGE] * (PATCHES + 1), 9, 10, 11]]),
    "pixel_values": PROMPTS["one"]["pixel_values"],
}


def masked_run(model, inputs, plans, ids):
    """Logits of the uncompressed prompt and ``ids`` behind it, with dropped tokens hidden."""
    seen = inputs["attention_mask"].bool()
    positions = (seen.long().cumsum(-1) - 1).clamp_min(0)
    row, column = (inputs["input_ids"] == IMAGE).nonzero(as_tuple=True)
    hidden = ~torch.cat([plan.keep_mask for plan in plans])
    seen[row[hidden], column[hidden]] = False
    more = torch.arange(1, ids.shape[1] + 1)
    positions = torch.cat([positions, positions[:, -1:] + more], -1)
    seen = torch.cat([seen, torch.ones_like(ids, dtype=torch.bool)], -1)
    length = seen.shape[1]
    visible = torch.ones(length, length).tril().bool() & seen[:, None, None]
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(
            input_ids=torch.cat([inputs["input_ids"], ids], -1),
            pixel_values=inputs["pixel_values"],
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        ).logits[:, -ids.shape[1] - 1 :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_an_answer_equals_that_of_the_masked_full_length_run(name, tower, attention, ratio):
    model, inputs = model_of(tower, attention), PROMPTS[name]
    strategy = tokenfuse.get_strategy("attention", keep_ratio=ratio)
    short = tokenfuse.compress(model, inputs, strategy)
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    # A random model may say the placeholder, for which the reference has no image.
    options = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}
    out = model.generate(**short, max_new_tokens=5, **options)
    answer = out.sequences[:, short["input_ids"].shape[1] :]
    expected = masked_run(model, inputs, short.plans["image"], answer[:, :-1])
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PROMPTS)
def test_keeping_all_changes_nothing(name):
    model, inputs = model_of(), PROMPTS[name]
    plain = model.generate(**inputs, max_new_tokens=5)
    with tokenfuse.attach(model, {"strategy": "attention", "keep_ratio": 1.0}):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)


def encode(adapter, inputs, *more):
    return adapter.encode(adapter.read(inputs), *more)


@pytest.mark.parametrize("block", [0, -2, -1])
def test_saliency_is_what_the_class_token_pays(block):
    model, inputs = model_of("clip", "eager"), PROMPTS["two images"]
    tower = model.model.vision_tower
    with torch.no_grad():
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions[block]
        items = encode(Llava(model), inputs, {"image": Needs(Attention(block))})[0].items
    for weights, tokens in zip(maps, items, strict=True):
        paid = weights.mean(0)[0, 1:]
        torch.testing.assert_close(tokens.saliency, paid / paid.sum(), atol=1e-6, rtol=1e-4)
    # FasterVLM's selection, and the dominant tokens of VisionZip: the top of that row.
    plan = tokenfuse.compress(
        model, inputs, {"strategy": "attention", "block": block, "keep_ratio": 0.25}
    ).plans["image"][0]
    assert torch.equal(plan.survivors, top(maps[0].mean(0)[0, 1:], 4))


def test_saliency_without_a_class_token_is_what_all_queries_pay():
    model, inputs = model_of("siglip", "eager"), PROMPTS["one"]
    with torch.no_grad():
        tower = model.model.vision_tower
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
        tokens = encode(Llava(model), inputs, {"image": Needs(Attention(-1))})[0].items[0]
    torch.testing.assert_close(tokens.saliency, maps[0].mean((0, 1)), atol=1e-6, rtol=1e-4)


def test_the_adapter_is_found_for_llava_alone():
    assert isinstance(default_registry().adapter(model_of()), Llava)
    assert not Llava.matches(torch.nn.Linear(1, 1))


def test_a_class_token_among_the_patches_stays():
    short = tokenfuse.compress(model_of(select="full"), ONE_WITH_CLASS, "attention")
    assert short.report.items[0].grid == (1, 4, 4)
    assert short.report.tokens_after == 8
    features = short["mm_encoder_outputs"]["image"].pooler_output[0]
    with torch.no_grad():
        whole = model_of(select="full").model.get_image_features(PROMPTS["one"]["pixel_values"])
    assert len(features) == 9
    assert torch.equal(features[0], whole.pooler_output[0][0])
    # What the call says counts, as it does for the model.
    asked = PROMPTS["one"] | {"vision_feature_select_strategy": "default"}
    assert tokenfuse.compress(model_of(select="full"), asked, "attention").report.tokens_after == 8


def test_a_video_is_refused():
    inputs = PROMPTS["one"] | {"pixel_values_videos": torch.zeros(1, 2, 3, SIDE, SIDE)}
    with pytest.raises(PromptError, match="reads no videos; expected pixel_values"):
        tokenfuse.compress(model_of(), inputs, "attention")
