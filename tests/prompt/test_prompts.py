"""Prompts that cannot be compressed as they are: each refusal says what to do."""

import pytest
import torch

import tokenfuse
from models import AMONG, batch, build, drop, image_then_video, model_of, one_image, one_video
from tokenfuse.errors import ConfigError, PromptError, TokensError

pytestmark = pytest.mark.usefixtures("one_thread")


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


def as_all(change):
    """Apply ``change`` to all that has one column per token."""
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return lambda inputs: {k: change(v) if k in per_token else v for k, v in inputs.items()}


def hide_a_placeholder(inputs):
    mask = inputs["attention_mask"].clone()
    mask[0, (inputs["mm_token_type_ids"][0] != 0).nonzero()[2]] = 0
    return {**inputs, "attention_mask": mask}


REFUSED = {
    "no ids": (lambda x: without(x, "input_ids"), "no input_ids of shape"),
    "ids of one dimension": (lambda x: {**x, "input_ids": x["input_ids"][0]}, "no input_ids"),
    "ids in a list": (lambda x: {**x, "input_ids": x["input_ids"].tolist()}, "return_tensors"),
    "embeddings": (
        lambda x: {**x, "inputs_embeds": torch.zeros(1, 68, 48)},
        "inputs_embeds, which cannot be shortened",
    ),
    "only embeddings": (
        lambda x: {**without(x, "input_ids"), "inputs_embeds": torch.zeros(1, 68, 48)},
        "not inputs_embeds",
    ),
    "truncated": (
        as_all(lambda x: x[:, :50]),
        r"shows \d\d video placeholder\(s\), the video features are 27",
    ),
    "truncated ids only": (lambda x: {**x, "input_ids": x["input_ids"][:, :60]}, "has shape"),
    "a placeholder hidden by the mask": (
        hide_a_placeholder,
        r"shows 26 video placeholder\(s\), the video features are 27",
    ),
    "no grid": (lambda x: without(x, "video_grid_thw"), "video_grid_thw is missing"),
    "another grid": (
        lambda x: {**x, "video_grid_thw": x["video_grid_thw"] + 1},
        "hold 108 patches, video_grid_thw describes 196",
    ),
    "no token types": (lambda x: without(x, "mm_token_type_ids"), "mm_token_type_ids is missing"),
    "a mask of four dimensions": (
        lambda x: {**x, "attention_mask": torch.ones(1, 1, 68, 68)},
        r"attention_mask has shape \(1, 1, 68, 68\)",
    ),
    "a dictionary of masks": (
        lambda x: {**x, "attention_mask": {"full_attention": None}},
        "attention_mask has shape",
    ),
    "padding without a mask": (
        lambda x: {
            **without(x, "attention_mask"),
            "input_ids": x["input_ids"].index_fill(1, torch.tensor([0]), PAD),
        },
        "attention_mask is missing",
    ),
    "features in place of pixels": (
        lambda x: {**without(x, "pixel_values_videos"), "mm_encoder_outputs": {"video": object()}},
        "encoded or compressed already",
    ),
    "features beside pixels": (
        lambda x: {**x, "mm_encoder_outputs": {"video": object()}},
        "encoded or compressed already",
    ),
    "placeholders without pixels": (
        lambda x: without(x, "pixel_values_videos", "video_grid_thw"),
        r"shows 27 video placeholder\(s\), the video features are 0",
    ),
    "positions of another length": (
        lambda x: {**x, "position_ids": torch.arange(9)[None]},
        "position_ids have shape",
    ),
    "packed prompts": (
        lambda x: {
            **without(x, "attention_mask"),
            "position_ids": (torch.arange(68) % 40)[None],
        },
        "pad instead of packing",
    ),
    "packed prompts for flash attention": (
        lambda x: {**x, "cu_seq_lens_q": torch.tensor([0, 40, 68])},
        "one prompt per row",
    ),
    "an unknown tensor per token": (
        lambda x: {**x, "shift_labels": x["input_ids"]},
        "leave shift_labels out",
    ),
    "labels of another length": (
        lambda x: {**x, "labels": x["input_ids"][:, 1:]},
        "labels has shape",
    ),
}
PAD = model_of().generation_config.pad_token_id


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_prompt_is_refused_by_compress_and_attach(name):
    change, said = REFUSED[name]
    model, inputs = model_of(), one_video()
    assert inputs["input_ids"].shape == (1, 68)
    with pytest.raises(PromptError, match=said):
        tokenfuse.compress(model, change(inputs), drop(), registry=AMONG)
    with tokenfuse.attach(model, drop(), registry=AMONG) as session:
        for call in (model, model.generate):
            with pytest.raises(PromptError, match=said):
                call(**change(inputs))
    assert session.report is None


def test_something_else_than_inputs_is_refused():
    with pytest.raises(PromptError, match="no input_ids"):
        tokenfuse.compress(model_of(), one_video()["input_ids"], drop(), registry=AMONG)


def test_an_image_without_pixels_beside_a_video_is_refused():
    inputs = without(image_then_video(), "pixel_values", "image_grid_thw")
    with pytest.raises(PromptError, match=r"shows 9 image placeholder\(s\), the image features"):
        tokenfuse.compress(model_of(), inputs, drop(), registry=AMONG)


def test_one_row_of_a_batch_without_its_video_is_refused():
    inputs = batch()
    inputs["video_grid_thw"] = inputs["video_grid_thw"][1:]
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][108:]
    with pytest.raises(PromptError, match=r"shows \d+ video placeholder\(s\), the video features"):
        tokenfuse.compress(model_of(), inputs, drop(), registry=AMONG)


def test_a_prompt_may_not_end_with_a_token_that_the_plan_drops():
    inputs = one_image()
    end = int((inputs["mm_token_type_ids"][0] != 0).nonzero().max()) + 1
    inputs = as_all(lambda x: x[:, :end])(inputs)
    tokenfuse.compress(model_of(), inputs, drop(0.0), registry=AMONG)
    with pytest.raises(PromptError, match="ends with a visual token"):
        tokenfuse.compress(model_of(), inputs, "halves", registry=AMONG)


@pytest.mark.parametrize("where", ["pixels", "weights"])
def test_nan_is_refused_by_name(where):
    model, inputs = build(), one_video()
    if where == "pixels":
        inputs["pixel_values_videos"][50, 0] = float("nan")
    else:
        model.model.visual.merger.linear_fc2.bias.data[3] = float("nan")
    with pytest.raises(TokensError, match="NaN"):
        tokenfuse.compress(model, inputs, drop(), registry=AMONG)
    with (
        tokenfuse.attach(model, drop(), registry=AMONG),
        pytest.raises(TokensError, match="NaN"),
    ):
        model.generate(**inputs)


def test_an_unknown_padding_side_is_refused():
    with pytest.raises(ConfigError, match="valid: left, right"):
        tokenfuse.compress(model_of(), one_video(), drop(), padding_side="top", registry=AMONG)


def test_refused_prompts_leave_the_inputs_alone():
    inputs = one_video()
    before = {name: value.clone() for name, value in inputs.items()}
    tokenfuse.compress(model_of(), inputs, drop(), registry=AMONG)
    with tokenfuse.attach(model_of(), drop(), registry=AMONG):
        model_of().generate(**inputs, max_new_tokens=2)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], before[name]) for name in before)
