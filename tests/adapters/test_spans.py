"""Where the visual tokens are among a tower's features, and what is refused rather than guessed."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import ModelOutput

import tokenfuse
from families import FAMILIES, RESAMPLED
from tokenfuse import FusionPlan
from tokenfuse.adapters._base import Encoded
from tokenfuse.adapters._spans import Span, as_frames, flat, from_pixels, from_video_pixels
from tokenfuse.errors import PromptError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Other(ModelOutput):
    """What a tower of another kind might return."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    scores: torch.Tensor | None = None


VISION = SimpleNamespace(patch_size=8)
NEWLINE = torch.full((4,), 7.0)


def features(*parts, width=4):
    """Random features, and newlines where a part is None."""
    rows = [NEWLINE[None] if p is None else torch.randn(p, width) for p in parts]
    return torch.cat(rows)


def pixels(*shape):
    return torch.zeros(*shape)


UNEVEN = features(16, 5, None, 4, None)
side, few = st.integers(1, 4), st.integers(0, 3)
SPANS = st.builds(Span, st.tuples(side, side, side), few, few, few, few)


@given(SPANS)
def test_tokens_and_others_are_all_the_features_of_a_span(span):
    tokens, others = span.tokens(), span.others()
    assert sorted([*tokens.tolist(), *others.tolist()]) == list(range(span.size))
    t, h, w = span.grid
    assert len(tokens) == span.num_tokens == t * h * w
    assert span.plain == (len(others) == 0)
    # The layout, drawn by hand.
    row = "t" * w + "n" * span.per_row
    drawn = "x" * span.head + ("c" * span.per_frame + row * h) * t + "e" * span.tail
    assert [i for i, kind in enumerate(drawn) if kind == "t"] == tokens.tolist()
    assert len(drawn) == span.size


@given(SPANS, st.data())
def test_what_surrounds_tokens_stays_and_owns_itself(span, data):
    """Of the features of two items, a plan touches the visual tokens alone."""
    n = span.num_tokens
    kept = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    plan = FusionPlan.from_survivors(torch.tensor(sorted(kept)), n)
    # What the masks read of an encoded modality.
    part = SimpleNamespace(spans=[span] * 2)
    stays, owners = Encoded.keep_mask(part, [plan] * 2), Encoded.owners(part, [plan] * 2)
    chosen = span.tokens()[plan.survivors]
    expected = torch.cat([chosen, span.others()]).sort().values
    both = torch.cat([expected, expected + span.size])
    assert torch.equal(stays.nonzero()[:, 0], both)
    assert torch.equal(owners, torch.where(stays, torch.arange(2 * span.size), -1))


@given(SPANS, st.integers(1, 4))
def test_images_as_frames_are_the_same_features(span, count):
    image = span._replace(grid=(1, *span.grid[1:]), tail=0)
    (video,) = as_frames([image] * count, [0] * count)
    assert video.grid == (count, *image.grid[1:])
    for apart, whole in ((image.tokens(), video.tokens()), (image.others(), video.others())):
        shifted = torch.cat([apart + n * image.size for n in range(count)])
        assert torch.equal(whole.sort().values, shifted.sort().values)


def test_square_tiles_are_told_by_their_pixels():
    entries = [features(16), features(32)]
    spans = from_pixels(entries, pixels(3, 3, 32, 32), VISION, None)
    assert spans == [Span((1, 4, 4))] * 3


@pytest.mark.parametrize(
    ("size", "patch", "tokens", "grid"),
    [
        ((32, 64), 8, 32, (1, 4, 8)),
        ((32, 64), 8, 8, (1, 2, 4)),
        ((64, 32), [16, 8], 16, (1, 4, 4)),
        ((27 * 8, 27 * 8), 8, 196, (1, 14, 14)),  # half of 27, rounded up
        ((32, 32), 8, 1, (1, 1, 1)),
    ],
)
def test_a_token_is_a_square_of_patches(size, patch, tokens, grid):
    vision = SimpleNamespace(patch_size=patch)
    assert from_pixels([features(tokens)], pixels(1, 3, *size), vision, None) == [Span(grid)]


@pytest.mark.parametrize("entries", [(4, 12, 0), (4, 4, 4, 4), (16,)])
def test_black_tiles_are_padding(entries):
    """Whether the features come by prompt, by tile or in one."""
    tiles = pixels(3, 3, 3, 16, 16)
    tiles[0, 0] = tiles[1, :] = 1
    spans = from_pixels([features(n) for n in entries], tiles, VISION, None)
    assert spans == [Span((1, 2, 2))] * 4


def test_image_sizes_tell_the_grid_of_each_image():
    entries = [features(6), features(8)]
    sizes = [(16, 24), (32, 16)]
    spans = from_pixels(entries, pixels(2, 3, 32, 24), VISION, None, image_sizes=sizes)
    assert spans == [Span((1, 2, 3)), Span((1, 4, 2))]


def test_sizes_before_resizing_tell_no_grid():
    sizes = torch.tensor([(48, 12)])
    assert from_pixels([features(9)], pixels(1, 3, 24, 24), VISION, None, sizes) == [
        Span((1, 3, 3))
    ]


def test_newlines_part_the_whole_image_from_its_tiles_row_by_row():
    one = features(16, 5, None, 5, None, 5, None)
    untiled = features(16, None)
    spans = from_pixels([one, untiled], pixels(2, 5, 3, 32, 32), VISION, NEWLINE)
    assert spans == [Span((1, 4, 4)), Span((1, 3, 5), per_row=1), Span((1, 4, 4), tail=1)]


def test_a_video_may_end_with_a_newline():
    spans = from_video_pixels([features(12, None)], pixels(1, 3, 3, 32, 32), VISION, NEWLINE)
    assert spans == [Span((3, 2, 2), tail=1)]
    plain = from_video_pixels([features(12)], pixels(1, 3, 3, 32, 32), VISION, None)
    assert plain == [Span((3, 2, 2))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: from_pixels([features(17)], pixels(1, 3, 32, 32), VISION, None),
        lambda: from_pixels([features(10)], pixels(1, 3, 32, 32), VISION, None),
        lambda: from_pixels([features(16)], pixels(64, 192), VISION, None),
        lambda: from_pixels([features(16)], pixels(1, 3, 32, 32), SimpleNamespace(), None),
        lambda: from_pixels([features(16), features(20)], pixels(2, 3, 32, 32), VISION, None),
        lambda: from_pixels(
            [features(16, 5, None, 4, None)], pixels(1, 3, 32, 32), VISION, NEWLINE
        ),
        lambda: from_pixels([features(16, 5)], pixels(1, 3, 32, 32), VISION, NEWLINE),
        lambda: from_video_pixels([features(13)], pixels(1, 3, 3, 32, 32), VISION, None),
        lambda: from_video_pixels([features(6, None, 6)], pixels(1, 3, 3, 32, 32), VISION, NEWLINE),
        lambda: from_video_pixels([features(12)], pixels(3, 3, 32, 32), VISION, None),
    ],
    ids=[
        "a class token",
        "no square of patches",
        "patches, not pixels",
        "no patch size",
        "uneven tiles",
        "uneven rows",
        "no newline at the end",
        "no whole number per frame",
        "a newline inside",
        "a video without frames",
    ],
)
def test_what_does_not_say_where_tokens_are_is_refused(make):
    with pytest.raises(UnsupportedModelError, match="do not say where each visual token is"):
        make()


def test_frames_of_one_size_make_a_video():
    spans = [Span((1, 2, 3))] * 5
    assert as_frames(spans, [0, 0, 1, 1, 1]) == [Span((2, 2, 3)), Span((3, 2, 3))]
    assert as_frames([], []) == []


@pytest.mark.parametrize("odd", [Span((1, 3, 2)), Span((1, 2, 3), tail=1), Span((2, 2, 3))])
def test_frames_of_several_sizes_are_refused(odd):
    with pytest.raises(PromptError, match="expected the frames of one video, all of one size"):
        as_frames([Span((1, 2, 3)), odd], [0, 0])


def test_frames_with_something_behind_each_are_refused():
    """Such as newlines, which would stand between frames."""
    with pytest.raises(PromptError, match="and nothing behind any"):
        as_frames([Span((1, 2, 3), tail=1)] * 2, [0, 0])


def test_one_tensor_holds_the_features_of_any_container():
    parts = (torch.randn(2, 4), torch.randn(3, 4))
    assert torch.equal(flat(parts), torch.cat(parts))
    assert flat(torch.zeros(2, 3, 4)).shape == (6, 4)


@pytest.mark.parametrize("name", sorted(RESAMPLED))
def test_learned_queries_have_no_place(name):
    family = RESAMPLED[name]
    inputs = family.prompt([[("image", 1), ("text", 2)]])
    said = {
        "idefics2": r"by a Idefics2Perceiver\w+, whose queries have no place in the image",
        "blip_2": "no model family matches Blip2ForConditionalGeneration",
    }
    with pytest.raises(UnsupportedModelError, match=said[name]):
        tokenfuse.compress(family.build("sdpa"), inputs, "uniform")


GRIDS = {
    "llava": ("image", [(1, 4, 4)]),
    "llava_onevision": ("video", [(3, 2, 2)]),
    "llava_next_video": ("video", [(3, 2, 2)]),
    "video_llava": ("video", [(3, 4, 4)]),
}


@pytest.mark.parametrize("name", GRIDS)
def test_newlines_and_class_tokens_are_no_tokens_of_a_real_model(name):
    kind, grids = GRIDS[name]
    family = FAMILIES[name]
    inputs = family.prompt([[("text", 1), (kind, 1), ("text", 2)]])
    report = tokenfuse.compress(family.build("sdpa"), inputs, "uniform").report
    assert [item.grid for item in report.items] == grids


def test_the_class_token_of_each_frame_stays_when_a_video_is_compressed():
    family = FAMILIES["video_llava"]
    model, inputs = family.build("sdpa"), family.prompt([[("text", 1), ("video", 1), ("text", 2)]])
    frames = inputs["pixel_values_videos"]
    frames[:, 1:, :, :12] = frames[:, :1, :, :12]
    short = tokenfuse.compress(model, inputs, "ttf")
    (plan,) = short.plans["video"]
    assert 16 <= len(plan.survivors) < 48
    assert int((short["input_ids"] == model.config.video_token_id).sum()) == 3 + len(plan.survivors)
    with torch.no_grad():
        whole = flat(model.base_model.get_video_features(frames).pooler_output)
    kept = short["mm_encoder_outputs"]["video"].pooler_output[:, 0]
    for token in whole[::17]:
        assert (kept == token).all(-1).any()


def test_images_of_a_frame_each_with_a_class_token_can_be_one_video():
    family = FAMILIES["llava"]
    model, inputs = family.build("sdpa"), family.prompt([[("image", 1), ("image", 2), ("text", 2)]])
    model.config.vision_feature_select_strategy = "full"
    inputs["input_ids"] = torch.tensor([[4, *[model.config.image_token_id] * 34, 9]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    short = tokenfuse.compress(model, inputs, "uniform", frames_as_images=True)
    assert [(item.modality, item.grid) for item in short.report.items] == [("video", (2, 4, 4))]
    assert len(short["input_ids"][0]) == 2 + 2 + len(short.plans["image"][0].survivors)


def test_pixels_by_their_former_name_are_refused():
    """As the processor of Video-LLaVA returns them by default."""
    family = FAMILIES["video_llava"]
    model, inputs = family.build("sdpa"), family.prompt([[("text", 1), ("video", 1), ("text", 2)]])
    inputs["pixel_values_images"] = inputs.pop("pixel_values_videos")[0]
    with pytest.raises(PromptError, match="pass return_legacy_image_output=False"):
        tokenfuse.compress(model, inputs, "uniform")
    with (
        tokenfuse.attach(model, "uniform"),
        pytest.raises(PromptError, match="expected pixel_values"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_several_images_of_one_size_can_be_one_video():
    family = FAMILIES["llava"]
    inputs = family.prompt([[("text", 1), ("image", 1), ("image", 2), ("image", 3), ("text", 2)]])
    model = family.build("sdpa")
    report = tokenfuse.compress(model, inputs, "ttf", frames_as_images=True).report
    assert [(item.modality, item.grid) for item in report.items] == [("video", (3, 4, 4))]
    apart = tokenfuse.compress(model, inputs, "ttf").report
    assert [item.grid for item in apart.items] == [(1, 4, 4)] * 3
    assert apart.reason == "one frame only, and ttf compares frames"


def test_a_model_without_videos_says_so():
    family = FAMILIES["gemma3"]
    inputs = family.prompt([[("text", 1), ("image", 1), ("text", 2)]])
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    with pytest.raises(PromptError, match="reads no videos; expected pixel_values"):
        tokenfuse.compress(family.build("sdpa"), inputs, "uniform")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ((torch.zeros(1, 16, 48),), "returns tuple; expected pooler_output"),
        (Other(last_hidden_state=torch.zeros(1, 16, 48)), "returns last_hidden_state; expected"),
        (
            Other(pooler_output=torch.zeros(1, 16, 48), scores=torch.zeros(1)),
            "pooler_output, scores",
        ),
    ],
    ids=["a tuple", "nothing pooled", "something else beside it"],
)
def test_a_tower_that_returns_something_else_is_refused(output, said):
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    inputs = family.prompt([[("text", 1), ("image", 1), ("text", 2)]])
    model.model.get_image_features = lambda pixel_values, return_dict: output
    with pytest.raises(UnsupportedModelError, match=said):
        tokenfuse.compress(model, inputs, "uniform")
