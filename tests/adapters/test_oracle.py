"""A plan that only drops tokens equals the full-length run in which a mask hides them."""

import pytest
import torch

import tokenfuse
from models import (
    AMONG,
    Halves,
    Oracle,
    batch,
    build,
    drop,
    image_then_video,
    model_of,
    one_image,
    one_video,
    two_videos,
    video_then_image,
)
from tokenfuse.costs import kv_cache_bytes
from tokenfuse.errors import UnsupportedModelError
from tokenfuse.prompt.cache import cache_of

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = {
    "video": one_video,
    "image": one_image,
    "image, video": image_then_video,
    "video, image": video_then_image,
    "two videos": two_videos,
    "batch, padded left": batch,
    "batch, padded right": lambda: batch("right"),
}
LEFT = [name for name in PROMPTS if "right" not in name]
KINDS = ("dense", "moe")
ATTENTION = ("sdpa", "eager")
DROPS = {
    "33 %": drop(0.33),
    "67 %": drop(0.67, seed=1),
    "99 %": drop(0.99, seed=2),
    "whole frames": drop(0.1, frames=True),
}


def pytest_generate_tests(metafunc):
    """Under eager attention drop one share, or each if pytest is told ``--full``."""
    if {"attention", "dropped"} <= set(metafunc.fixturenames):
        every = [(attention, dropped) for attention in ATTENTION for dropped in DROPS]
        few = [pair for pair in every if pair[0] == "sdpa" or pair[1] == "67 %"]
        pairs = every if metafunc.config.getoption("full") else few
        metafunc.parametrize(("attention", "dropped"), pairs)


def compress(model, inputs, strategy, **options):
    return tokenfuse.compress(model, inputs, strategy, registry=AMONG, **options)


def rows(logits, mask):
    """The logits of each row's unpadded tokens."""
    return [one[real] for one, real in zip(logits, mask.bool(), strict=True)]


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_the_masked_full_length_run(kind, attention, name, dropped):
    model, inputs = model_of(kind, attention), PROMPTS[name]()
    short = compress(model, inputs, DROPS[dropped])
    oracle = Oracle(model, inputs, short.plans)
    with torch.no_grad():
        got = rows(model(**short).logits, short["attention_mask"])
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    for mine, full in zip(got, rows(oracle.logits(), oracle.seen), strict=True):
        close(mine, full)


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_equal_those_of_the_masked_full_length_run(kind, attention, name, dropped):
    model, inputs = model_of(kind, attention), PROMPTS[name]()
    short = compress(model, inputs, DROPS[dropped])
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**short, **options)
    tokens = out.sequences[:, short["input_ids"].shape[1] :]
    assert tokens.shape[1] == 8
    assert Oracle(model, inputs, short.plans).says(tokens)
    close(torch.stack(out.logits, 1), Oracle(model, inputs, short.plans).follow(tokens))


def test_whole_frames_are_emptied_by_the_plan_that_says_so():
    short = compress(model_of(), one_video(patches=3), DROPS["whole frames"])
    assert 0 in short.report.items[0].frame_tokens_after
    assert min(short.report.items[0].frame_tokens_after[::2]) > 0


def test_the_oracle_sees_a_wrong_position():
    """What contiguous positions change, and 1e-4 does not forgive."""
    model, inputs = model_of(), one_video()
    short = compress(model, inputs, drop(0.5), positions="contiguous")
    oracle = Oracle(model, inputs, short.plans)
    assert torch.equal(short["position_ids"][1], torch.arange(short["input_ids"].shape[1])[None])
    with torch.no_grad():
        difference = model(**short).logits[0, -1] - oracle.logits()[0, -1]
    assert difference.abs().max() > 1e-2


def test_the_oracle_sees_missing_deepstack_features():
    model, inputs = model_of(), one_video()
    short = compress(model, inputs, drop(0.5))
    assert len(short["mm_encoder_outputs"]["video"].deepstack_features) == 2
    oracle = Oracle(model, inputs, short.plans)
    for layer in short["mm_encoder_outputs"]["video"].deepstack_features:
        layer[0].mul_(0.9)
    with torch.no_grad():
        difference = model(**short).logits[0, -1] - oracle.logits()[0, -1]
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_keeps_all_gives_the_same_bits(kind, attention, name):
    model, inputs = model_of(kind, attention), PROMPTS[name]()
    with torch.no_grad():
        plain = model(**inputs).logits
    delta = model.model.rope_deltas
    short = compress(model, inputs, drop(0.0))
    assert torch.equal(model.model.rope_deltas, delta)
    with torch.no_grad():
        same = model(**short).logits
    for mine, theirs in zip(
        rows(same, short["attention_mask"]), rows(plain, inputs["attention_mask"]), strict=True
    ):
        assert torch.equal(mine, theirs)
    if name in LEFT:
        mine = model.generate(**compress(model, inputs, drop(0.0)), max_new_tokens=8)
        assert torch.equal(mine, model.generate(**inputs, max_new_tokens=8))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", [drop(0.5), Halves()])
def test_a_batch_gives_what_its_prompts_give_alone(side, strategy):
    model, inputs = model_of(), batch(side)
    together = compress(model, inputs, strategy)
    with torch.no_grad():
        in_batch = rows(model(**together).logits, together["attention_mask"])
    for i, mine in enumerate(in_batch):
        alone = compress(model, batch(side, [i]), strategy)
        with torch.no_grad():
            close(mine, model(**alone).logits[0])


def test_videos_of_other_rows_do_not_matter():
    model = model_of()
    one, other = (compress(model, batch(rows=(0, i)), drop(0.5)) for i in (1, 2))
    with torch.no_grad():
        mine, same = (rows(model(**x).logits, x["attention_mask"])[0] for x in (one, other))
    close(mine, same)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_can_be_chosen(side):
    short = compress(model_of(), batch(), drop(0.5), padding_side=side)
    mask = short["attention_mask"]
    assert 0 in mask
    assert torch.equal(mask, mask.sort(-1, descending=side == "right").values)


def test_fused_tokens_are_means_at_the_survivors_places():
    """Features and DeepStack layers alike, item by item."""
    model, inputs = model_of(), two_videos()
    with torch.no_grad():
        full = model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        )
    fused = compress(model, inputs, Halves())["mm_encoder_outputs"]["video"]
    layers = [full.pooler_output, *full.deepstack_features]
    for mine, theirs in zip([fused.pooler_output, *fused.deepstack_features], layers, strict=True):
        for short, x in zip(mine, theirs, strict=True):
            kept = -(-len(x) // 2)
            expected = x[:kept].clone()
            expected[: len(x) - kept] = (x[: len(x) - kept] + x[kept:]) / 2
            close(short, expected, atol=1e-6)


def test_an_evaluated_model_keeps_nothing_for_gradients_and_says_so():
    from models import build

    model = build()
    short = compress(model, one_video(), Halves())
    fused = short["mm_encoder_outputs"]["video"]
    for features in (*fused.pooler_output, *fused.deepstack_features[0]):
        assert [edge for edge, _ in features.grad_fn.next_functions if edge] == [
            features.grad_fn.next_functions[1][0]
        ]
    with pytest.raises(UnsupportedModelError, match=r"expected model\.train\(\) before compress"):
        model(**short).logits.sum().backward()
    with torch.no_grad():
        fused = compress(model, one_video(), Halves())["mm_encoder_outputs"]["video"]
    assert not any(x.requires_grad for x in (*fused.pooler_output, *fused.deepstack_features[0]))
    model.model.visual.requires_grad_(False)
    model(**compress(model, one_video(), Halves())).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_gradients_flow_through_an_attached_model_in_eval_mode_as_without():
    from models import build

    model, inputs = build(), one_video()
    with tokenfuse.attach(model, drop(0.0), registry=AMONG):
        model(**inputs).logits.sum().backward()
    mine = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(**inputs).logits.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad)
    assert model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0


def test_a_trained_model_learns_through_fused_features():
    from models import build

    model, inputs = build().train(), one_video()
    loss = model(**compress(model, {**inputs, "labels": inputs["input_ids"]}, Halves())).loss
    loss.backward()
    tower = model.model.visual
    for weight in (
        tower.patch_embed.proj.weight,
        tower.merger.linear_fc2.weight,
        tower.deepstack_merger_list[1].linear_fc2.weight,
        model.lm_head.weight,
    ):
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_give_the_same(mode):
    model, inputs = model_of(), one_video()
    with torch.no_grad():
        expected = model(**compress(model, inputs, drop(0.5))).logits
    with mode():
        assert torch.equal(model(**compress(model, inputs, drop(0.5))).logits, expected)


def test_report_counts_what_the_plans_and_the_cache_hold():
    model, inputs = model_of(), image_then_video()
    short = compress(model, inputs, drop(0.6))
    report = short.report
    plans = [*short.plans["image"], *short.plans["video"]]
    assert [item.modality for item in report.items] == ["image", "video"]
    assert [item.grid for item in report.items] == [(1, 3, 3), (2, 3, 3)]
    assert [item.tokens_before for item in report.items] == [9, 18]
    assert [item.tokens_after for item in report.items] == [plan.num_kept for plan in plans]
    for item, plan in zip(report.items, plans, strict=True):
        per_frame = plan.keep_mask.view(item.grid[0], -1).sum(-1).tolist()
        assert item.frame_tokens_after == per_frame
    assert report.prompt_before == [inputs["input_ids"].shape[1]]
    assert report.prompt_after == [short["input_ids"].shape[1]]
    removed = 27 - sum(plan.num_kept for plan in plans)
    assert report.prompt_before[0] - report.prompt_after[0] == removed
    assert report.reduction == pytest.approx(removed / 27)
    assert report.reason is None

    def cached(arguments):
        with torch.no_grad():
            cache = cache_of(model(**arguments, use_cache=True))
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))

    assert cached(inputs) == report.kv_cache_bytes_before
    assert cached(short) == report.kv_cache_bytes_after


def test_report_counts_the_tokens_of_a_batch_without_padding():
    model, inputs = model_of("moe"), batch()
    short = compress(model, inputs, drop(0.5))
    assert short.report.prompt_before == inputs["attention_mask"].sum(-1).tolist()
    assert short.report.prompt_after == short["attention_mask"].sum(-1).tolist()
    config = model.config.text_config
    assert short.report.kv_cache_bytes_after == kv_cache_bytes(
        config, short["attention_mask"].sum(-1).tolist(), 4
    )


def test_cache_bytes_are_those_of_the_text_and_of_a_quantised_cache():
    model = build()
    whole = compress(model, one_video(), drop(0.5)).report.kv_cache_bytes_after
    asked = {"cache_implementation": "quantized", "cache_config": {"nbits": 2, "backend": "hqq"}}
    quantised = compress(model, {**one_video(), **asked}, drop(0.5)).report
    assert quantised.kv_cache_bytes_after * 16 == whole
    model.model.visual.to(torch.bfloat16)
    mixed = compress(model, one_video(), drop(0.5)).report
    assert mixed.kv_cache_bytes_after == whole


def test_report_reads_well_and_measures_its_own_cost():
    report = compress(model_of(), one_video(), drop(0.5)).report
    assert min(report.encode_ms, report.plan_ms, report.realign_ms) > 0
    text = str(report)
    assert f"27 -> {report.tokens_after}" in text
    assert "not compressed" not in text
    kept = str(compress(model_of(), one_video(), drop(0.0)).report)
    assert "27 -> 27" in kept
    assert "not compressed: the strategy kept every token" in kept
