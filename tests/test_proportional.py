"""Attention that weighs a survivor by the tokens that were fused into it."""

import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LogitsProcessor

import tokenfuse
from models import AMONG, Halves, batch, build, model_of, one_video, prompt, two_videos, user
from tokenfuse.caches import as_argument, cache_of
from tokenfuse.errors import ConfigError, UnsupportedModelError
from tokenfuse.proportional import attention_modules, proportional_attention

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = Halves(attention="proportional")


def attach(model, strategy=HALVES):
    return tokenfuse.attach(model, strategy, among=AMONG)


def hooks(model):
    return [len(module._forward_pre_hooks) for module in attention_modules(model)]


class OneAttention(nn.Module):
    """An attention without weights: queries, keys and values are the states."""

    layer_idx = 0
    num_key_value_groups = 1
    config = LlamaConfig(attn_implementation="sdpa")

    def get_decoder(self):
        return self

    def forward(self, hidden_states, attention_mask=None):
        x = hidden_states[:, None]
        causal = attention_mask is None and x.shape[2] > 1
        return scaled_dot_product_attention(x, x, x, attention_mask, is_causal=causal)[:, 0]


@given(st.integers(1, 5), st.integers(0, 4), st.data())
def test_a_size_is_as_many_equal_keys(fused, text, data):
    """What follows the prompt sees a token of size s as it would see s tokens like it."""
    sizes = torch.tensor(
        data.draw(st.lists(st.integers(1, 9), min_size=fused, max_size=fused)) + [1] * text
    )
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(1, len(sizes) + 2, 8, generator=rng, dtype=torch.float64)
    many = torch.cat([x[:, : len(sizes)].repeat_interleave(sizes, 1), x[:, len(sizes) :]], 1)
    model = OneAttention()
    with proportional_attention(model, sizes[None]):
        short = model(hidden_states=x)[:, -2:]
    torch.testing.assert_close(short, model(hidden_states=many)[:, -2:])


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [one_video, two_videos, lambda: batch("left"), batch])
def test_logits_equal_those_with_a_mask_of_the_callers_own(kind, make):
    """The reference: transformers' own 4-D masks, with the sizes told from the plans."""
    model, inputs = model_of(attention=kind), make()
    short = tokenfuse.compress(model, inputs, Halves(), among=AMONG)
    config, real = model.config, short["attention_mask"].bool()
    sizes = torch.ones_like(short["input_ids"])
    for modality, token in (("image", config.image_token_id), ("video", config.video_token_id)):
        plans = short.plans.get(modality, [])
        here = short["input_ids"] == token
        assert int(here.sum()) == sum(plan.num_kept for plan in plans)
        if plans:
            sizes[here] = torch.cat([torch.bincount(plan.target) for plan in plans])
    assert int(sizes.max()) == 2
    length = sizes.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]
    mask = torch.where(seen, sizes.log()[:, None, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(**{**short, "attention_mask": mask}).logits
        with attach(model):
            got = model(**inputs).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)
    with torch.no_grad():
        short = tokenfuse.compress(model, inputs, Halves(), among=AMONG)
        assert not torch.allclose(model(**short).logits[real], expected[real], atol=1e-2)


OPTIONS = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [one_video, lambda: batch("left")])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_the_kind_of_cache_does_not_change_the_answer(kind, make, options):
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if "prefill_chunk_size" in options and release < (5, 23):
        pytest.skip("transformers reads chunks of visual prompts wrongly before 5.23")
    model, inputs = model_of(attention=kind), make()
    with attach(model):
        expected = model.generate(**inputs, **OPTIONS)
        found = model.generate(**inputs, **OPTIONS, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_rejected_draft_leaves_no_mask_behind(tokens):
    model, inputs = model_of(), one_video()
    with attach(model):
        expected = model.generate(**inputs, **OPTIONS)
        found = model.generate(**inputs, **OPTIONS, prompt_lookup_num_tokens=tokens)
    assert torch.equal(found.sequences, expected.sequences)


def test_another_prompt_that_is_read_meanwhile_is_read_as_ever():
    """As by guidance, or by another thread while a stream is read."""
    model, inputs = model_of(), one_video()
    text = prompt([user("What color is it, and what shape is it, and where is it?" * 3)])
    seen = []

    class Reads(LogitsProcessor):
        def __call__(self, ids, scores):
            # By the class, as a call of another thread after the block.
            seen.append(type(model).forward(model, **text).logits)
            return scores

    with torch.no_grad():
        expected = model(**text).logits
    with attach(model):
        plain = model.generate(**inputs, **OPTIONS)
        found = model.generate(**inputs, **OPTIONS, logits_processor=[Reads()])
    assert torch.equal(found.sequences, plain.sequences)
    assert len(seen) == 5
    for logits in seen:
        torch.testing.assert_close(logits, expected)


def test_beams_and_samples_see_the_sizes_of_their_own_prompt():
    model, rows = model_of(), (0, 1)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    with attach(model):
        both = model.generate(**batch("left", rows), **options)
        alone = [model.generate(**batch("left", [row]), **options) for row in rows]
    for row in rows:
        assert torch.equal(both[2 * row : 2 * row + 2, -4:], alone[row][:, -4:])


def test_many_questions_about_one_prompt_equal_the_whole_prompts():
    model, inputs = model_of(), batch("left", (0, 1))
    texts = (" What color is it?", " How many objects are there?")
    ids = [prompt([text])["input_ids"].expand(2, -1) for text in texts]
    with attach(model) as session:
        read = session.encode(inputs)
        for question in ids:
            whole = dict(inputs)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                new = question if name == "input_ids" else torch.full_like(question, 1)
                new = torch.zeros_like(new) if name == "mm_token_type_ids" else new
                whole[name] = torch.cat([inputs[name], new], -1)
            expected = model.generate(**whole, **OPTIONS)
            found = session.ask(read, question, **OPTIONS)
            assert torch.equal(found.sequences, expected.sequences)
            torch.testing.assert_close(
                torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0
            )
        twice = session.ask(read, ids[0].repeat_interleave(2, 0), **OPTIONS)
        once = session.ask(read, ids[0], **OPTIONS)
        assert torch.equal(twice.sequences, once.sequences.repeat_interleave(2, 0))


def test_a_new_video_in_a_later_turn_brings_its_sizes():
    model, first = model_of(), one_video()
    with attach(model):
        out = model.generate(**first, **OPTIONS)
        both = two_turns(first, out.sequences)
        kept = model.generate(**both, **as_argument(cache_of(out)), **OPTIONS)
        anew = model.generate(**both, **OPTIONS)
    assert torch.equal(kept.sequences, anew.sequences)
    torch.testing.assert_close(
        torch.stack(kept.logits), torch.stack(anew.logits), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("begins", ["plain", "proportional"])
def test_a_cache_that_changes_sessions_keeps_what_it_was_read_by(begins):
    """The first video weighs as in its own session, the second one as in the next."""
    model, first = model_of(), one_video()
    sessions = {"plain": Halves(), "proportional": HALVES}
    ends = next(name for name in sessions if name != begins)
    with attach(model, sessions[begins]):
        out = model.generate(**first, **OPTIONS)
    cache, both = cache_of(out), two_turns(first, out.sequences)
    with attach(model, sessions[ends]):
        model.generate(**both, **as_argument(cache), max_new_tokens=1)
    sizes, length = cache._tokenfuse_turn.sizes, out.sequences.shape[1]
    begun = int((cache._tokenfuse_turn.columns[0] < length).sum())
    assert int(sizes[:, :begun].max()) == (2 if begins == "proportional" else 1)
    assert int(sizes[:, begun:].max()) == (2 if ends == "proportional" else 1)


def two_turns(first, answered):
    """The inputs of a conversation that shows a second video."""
    new = one_video(4, 2, "And this one?")
    said = answered[:, first["input_ids"].shape[1] :]
    whole = {name: torch.cat([first[name], new[name]]) for name in first if "video" in name}
    whole["input_ids"] = torch.cat([answered, new["input_ids"]], -1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        between = torch.full_like(said, fill)
        whole[name] = torch.cat([first[name], between, new[name]], -1)
    return whole


def test_nothing_stays_on_the_model():
    model, inputs = build(), one_video()
    before = hooks(model)
    with attach(model):
        assert hooks(model) == before
        model.generate(**inputs, max_new_tokens=2)
        assert hooks(model) == before
        with pytest.raises(ValueError, match="no_such_option"):
            model.generate(**inputs, no_such_option=1)
        assert hooks(model) == before
    text = prompt([user("What color is it?")])
    plain = model.generate(**text, max_new_tokens=4)
    with attach(model):
        assert torch.equal(model.generate(**text, max_new_tokens=4), plain)


def test_compress_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="or use attach"):
        tokenfuse.compress(model_of(), one_video(), HALVES, among=AMONG)


def test_attention_that_takes_no_bias_is_refused():
    model = build()
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2 does not take"):
        attach(model)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_gradients_reach_the_model_and_checkpointing_is_refused(kind):
    model, inputs = build(attention=kind).train(), one_video()
    with attach(model):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    # The name of the method depends on the release of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    with attach(model), pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        model(**inputs, labels=inputs["input_ids"], use_cache=False)


def test_a_vision_transformer_has_no_prompt_to_read_proportionally():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    with pytest.raises(ConfigError, match="attention is about the prompt"):
        tokenfuse.attach(vit, "tome", r=8, attention="proportional")


def test_a_strategy_with_an_option_of_that_name_is_not_taken_for_it():
    class Mine(Halves):
        attention: str = "flash"

    with attach(model_of(), Mine()):
        out = model_of().generate(**one_video(), **OPTIONS)
    assert cache_of(out)._tokenfuse_turn.sizes is None


def test_a_part_of_a_chain_cannot_say_how_the_whole_is_read():
    with pytest.raises(ConfigError, match="ttf sets attention; set it at the top"):
        tokenfuse.load_strategy(
            {"compose": [{"strategy": "ttf", "attention": "proportional"}, "uniform"]}
        )
