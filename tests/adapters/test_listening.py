"""Saliency and text that the adapter supplies."""

import pytest
import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl

from models import frames, image_then_video, model_of, one_video, processor, prompt, user
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.errors import ConfigError, PromptError
from tokenfuse.ops import attention as kernel
from tokenfuse.strategies._base import Attention, Needs

pytestmark = pytest.mark.usefixtures("one_thread")
GROUP = 4


def two_videos():
    """Two prompts of unequal videos, left-padded, and each alone."""
    videos, asked = [frames(5, 2), frames(6, 4)], ["What color is it?", "How many?"]
    texts = [user("video", question) for question in asked]
    both = prompt(texts, videos=videos)
    return both, [prompt([t], videos=[v]) for t, v in zip(texts, videos, strict=True)]


@pytest.fixture
def eager_maps(monkeypatch):
    """The attention maps of every vision block of an eager forward: per block, per frame."""
    maps = {}
    eager = modeling_qwen3_vl.eager_attention_forward

    def recording(module, *args, **kwargs):
        output, weights = eager(module, *args, **kwargs)
        maps.setdefault(module, []).append(weights[0])
        return output, weights

    monkeypatch.setattr(modeling_qwen3_vl, "eager_attention_forward", recording)
    return maps


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("make", [one_video, image_then_video, lambda: two_videos()[0]])
def test_saliency_is_what_an_eager_forward_s_map_says(block, make, eager_maps):
    inputs = make()
    eager, fast = Qwen3VL(model_of("dense", "eager")), Qwen3VL(model_of("dense", "sdpa"))
    needs = dict.fromkeys(("image", "video"), Needs(Attention(block)))
    with torch.no_grad():
        found = [x.saliency for part in fast.encode(fast.read(inputs), needs) for x in part.items]
        assert not eager_maps, "the sdpa model makes no map"
        eager.encode(eager.read(inputs))
    maps = eager_maps[eager.model.model.visual.blocks[block].attn]
    # (heads, queries, keys) per frame: what each key gets, then four patches to a token.
    expected = torch.cat([m.mean((0, 1)).view(-1, GROUP).sum(-1) for m in maps])
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-6, rtol=1e-4)
    assert expected.std() > 0.01 * expected.mean(), "a flat map would prove nothing"


def test_the_mean_query_s_attention_is_one_softmax_per_frame_and_head():
    torch.manual_seed(0)
    q, k = torch.randn(2, 40, 3, 5)
    found = kernel.mean_query_attention(q, k, [16, 24], 0.7, group=GROUP)
    expected = []
    for rows in (slice(0, 16), slice(16, 40)):
        heads = []
        for head in range(3):
            keys = k[rows, head].view(-1, GROUP, 5).mean(1)
            heads.append((keys @ q[rows, head].mean(0) * 0.7).softmax(0))
        expected.append(torch.stack(heads).mean(0))
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("score", [kernel.attention_received, kernel.mean_query_attention])
def test_saliency_sums_to_one_over_each_frame(score):
    torch.manual_seed(1)
    q, k = torch.randn(2, 36, 2, 8).bfloat16()
    found = score(q, k, [12, 24], 0.3, group=GROUP)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:3].sum(), torch.tensor(1.0))
    torch.testing.assert_close(found[3:].sum(), torch.tensor(1.0))


def test_chunks_of_queries_change_nothing(monkeypatch):
    torch.manual_seed(2)
    q, k = torch.randn(2, 64, 2, 8)
    whole = kernel.attention_received(q, k, [64], 0.3, group=GROUP)
    monkeypatch.setattr(kernel, "CHUNK", 300)
    torch.testing.assert_close(kernel.attention_received(q, k, [64], 0.3, group=GROUP), whole)


def encode(model, inputs, *more):
    adapter = Qwen3VL(model)
    return adapter.encode(adapter.read(inputs), *more)


def test_a_batch_supplies_what_each_prompt_supplies_alone():
    both, alone = two_videos()
    adapter = Qwen3VL(model_of())
    needs = {"video": Needs(Attention(-1), text=True)}
    with torch.no_grad():
        together = adapter.encode(adapter.read(both), needs)[0].items
        for tokens, inputs in zip(together, alone, strict=True):
            single = adapter.encode(adapter.read(inputs), needs)[0].items[0]
            torch.testing.assert_close(tokens.saliency, single.saliency)
            assert torch.equal(tokens.text, single.text)


def test_text_is_the_prompt_without_frames_and_their_timestamps():
    inputs = image_then_video()
    model = model_of()
    with torch.no_grad():
        parts = encode(model, inputs, dict.fromkeys(("image", "video"), Needs(text=True)))
    words = user("Look:", "and", "How many objects are there?")
    ids = processor().tokenizer(words, return_tensors="pt").input_ids[0]
    shown = model.get_input_embeddings()(ids).detach()
    for part in parts:
        assert len(part.items) == 1
        text = part.items[0].text
        seconds = len(text) - len(shown)
        assert 0 <= seconds < 12, "at most the first timestamp, which stands before its frame"
        assert {tuple(row) for row in shown.tolist()} <= {tuple(row) for row in text.tolist()}


def test_nothing_is_supplied_unless_it_is_wanted():
    model = model_of()
    with torch.no_grad():
        tokens = encode(model, one_video())[0].items[0]
    assert tokens.saliency is None
    assert tokens.text is None
    assert all(not block.attn._forward_pre_hooks for block in model.model.visual.blocks)


def test_no_hook_stays_after_an_error():
    model = model_of()
    inputs = one_video() | {"pixel_values_videos": one_video()["pixel_values_videos"][:, :-1]}
    with pytest.raises(RuntimeError):
        encode(model, inputs, dict.fromkeys(("image", "video"), Needs(Attention(0))))
    assert all(not block.attn._forward_pre_hooks for block in model.model.visual.blocks)


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_does_not_exist_is_refused(block):
    with pytest.raises(ConfigError, match=r"has 3; expected -3\.\.2"):
        encode(model_of(), one_video(), {"video": Needs(Attention(block))})


def test_placeholders_that_do_not_fit_are_refused_before_the_tower_runs():
    inputs = one_video()
    ids = inputs["input_ids"] = inputs["input_ids"].clone()
    ids[0, (ids[0] == model_of().config.video_token_id).nonzero()[0]] = 5
    with pytest.raises(PromptError, match="placeholder"):
        encode(model_of(), inputs, dict.fromkeys(("image", "video"), Needs(text=True)))


def test_a_class_token_that_attends_to_itself_alone_leaves_nothing():
    q, k = torch.zeros(2, 5, 1, 4)
    q[0], k[0] = 100, 100
    found = kernel.attention_received(q, k, [5], 1.0, prefix=1)
    assert found.tolist() == [0, 0, 0, 0]
