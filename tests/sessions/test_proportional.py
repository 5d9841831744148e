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
from models import (
    AMONG,
    Forced,
    Halves,
    batch,
    build,
    model_of,
    one_video,
    prompt,
    two_videos,
    user,
)
from tokenfuse.config import Configuration
from tokenfuse.errors import ConfigError, UnsupportedModelError
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.prompt.shares import Shares
from tokenfuse.sessions import proportional
from tokenfuse.sessions.proportional import attention_modules, proportional_attention

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = Configuration(Halves(), attention="proportional")


def attach(model, strategy=HALVES):
    return tokenfuse.attach(model, strategy, registry=AMONG)


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


@given(st.data())
def test_each_query_sees_a_survivor_as_it_would_see_all_it_stands_for(data):
    """Alike tokens, wherever they stand: fused, they change nothing for any token that is left."""
    n = data.draw(st.integers(1, 9))
    owner = torch.tensor([data.draw(st.integers(0, n - 1)) for _ in range(n)])
    left = owner.unique()
    owner = owner.scatter(0, left, left)
    x = torch.randn(1, n + 2, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x[0, :n] = x[0, owner]
    whole = torch.cat([owner, torch.tensor([n])])[None]
    columns = torch.cat([left, torch.tensor([n])])[None]
    shares = Shares.of(whole, torch.arange(n + 1)[None], columns, torch.ones_like(columns).bool())
    assert shares.num_keys == len(left) + 1
    kept = torch.cat([columns[0], torch.tensor([n + 1])])
    model = OneAttention()
    expected = model(hidden_states=x)[:, kept]
    with proportional_attention(model, shares):
        found = model(hidden_states=x[:, kept])
    # No token can see what stands for an earlier one, but comes later.
    at = kept[:-1, None]
    early = (torch.arange(n + 1) <= at) & (whole > at)
    seen = torch.cat([~early.any(-1), torch.tensor([True])])
    torch.testing.assert_close(found[:, seen], expected[:, seen])


def test_a_cache_that_slides_leaves_the_weights_of_the_keys_it_still_holds():
    class Window:
        """Of five keys and one query, the last four."""

        def get_seq_length(self, layer):
            return 5

        def get_mask_sizes(self, queries, layer):
            return 4, 2

    owner = torch.tensor([[0, 1, 1, 3, 3, 3, 6, 7]])
    columns = torch.tensor([[0, 1, 3, 6, 7]])
    shares = Shares.of(owner, torch.arange(8)[None], columns, torch.ones_like(columns).bool())
    model = Catches()
    with proportional_attention(model, shares):
        mask = model(hidden_states=torch.zeros(1, 1, 8), past_key_values=Window())
    torch.testing.assert_close(mask.exp(), torch.tensor([[[[3.0, 1, 1, 1]]]]))


class Catches(OneAttention):
    """Gives back the mask that it gets."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        return attention_mask


def test_layers_of_two_kinds_in_turn_get_one_mask_each():
    own = torch.arange(6)[None]
    shares = Shares.of(own // 2 * 2, own, own[:, ::2], own[:, ::2] >= 0)
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    masks = [causal[None, None], causal.triu(-1)[None, None]]
    model, states = Catches(), torch.zeros(1, 3, 8)
    with proportional_attention(model, shares):
        first, second, *again = (
            model(hidden_states=states, attention_mask=mask) for mask in [*masks, *masks]
        )
    assert first is again[0]
    assert second is again[1]
    lowest = torch.finfo(torch.float32).min
    for found, mask in zip((first, second), masks, strict=True):
        assert torch.equal(found > lowest / 2, mask)
    torch.testing.assert_close(first[0, 0].exp(), torch.tensor([[1.0, 0, 0], [2, 1, 0], [2, 2, 1]]))


def test_many_queries_are_counted_some_at_a_time(monkeypatch):
    own = torch.arange(40)[None]
    shares = Shares.of(own // 4 * 4, own, own[:, ::2], own[:, ::2] >= 0)
    model, states = Catches(), torch.zeros(1, shares.num_keys, 8)
    with proportional_attention(model, shares):
        whole = model(hidden_states=states)
    monkeypatch.setattr(proportional, "AT_A_TIME", 3)
    with proportional_attention(model, shares):
        assert torch.equal(model(hidden_states=states), whole)


def test_types_that_the_model_does_not_know_change_nothing():
    model, inputs = model_of(), one_video()
    types = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad(), attach(model):
        expected = model(**inputs).logits
        assert torch.equal(model(**inputs, token_type_ids=types).logits, expected)


def counted(model, inputs, short):
    """How many tokens each of a short prompt stands for to each other, token by token."""
    rows, length = short["input_ids"].shape
    counts = torch.ones(rows, length, length)
    real = short["attention_mask"].bool()
    for modality in ("image", "video"):
        ids = inputs["input_ids"] == getattr(model.config, f"{modality}_token_id")
        plans = short.plans.get(modality, [])
        assert int(ids.sum()) == sum(plan.num_source for plan in plans)
        here = iter(ids.nonzero().tolist())
        for plan in plans:
            places = [next(here) for _ in range(plan.num_source)]
            row, targets = places[0][0], plan.target.tolist()
            columns = zip(short.columns[row].tolist(), real[row], strict=True)
            left = [column if ok else None for column, ok in columns]
            for slot, survivor in enumerate(plan.survivors.tolist()):
                key = left.index(places[survivor][1])
                sources = zip(places, targets, strict=True)
                mine = [column for (_, column), to in sources if to == slot]
                for query, column in enumerate(left):
                    if column is not None:
                        before = sum(source <= column for source in mine)
                        counts[row, query, key] = max(1, before)
    return counts


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [one_video, two_videos, lambda: batch("left"), batch])
def test_logits_equal_those_with_a_mask_of_the_callers_own(kind, make):
    """The reference: transformers' own 4-D masks, counted token by token from the plans."""
    model, inputs = model_of(attention=kind), make()
    short = tokenfuse.compress(model, inputs, Halves(), registry=AMONG)
    real = short["attention_mask"].bool()
    counts = counted(model, inputs, short)
    assert counts.unique().tolist() == [1, 2]
    length = real.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]
    mask = torch.where(seen, counts.log()[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(**{**short, "attention_mask": mask}).logits
        with attach(model):
            got = model(**inputs).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)
    with torch.no_grad():
        short = tokenfuse.compress(model, inputs, Halves(), registry=AMONG)
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
        forced = [Forced(expected.sequences)]
        found = model.generate(**inputs, **OPTIONS, **options, logits_processor=forced)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_rejected_draft_leaves_no_mask_behind(tokens):
    model, inputs = model_of(), one_video()
    with attach(model):
        expected = model.generate(**inputs, **OPTIONS)
        options = {"prompt_lookup_num_tokens": tokens}
        forced = [Forced(expected.sequences)]
        found = model.generate(**inputs, **OPTIONS, **options, logits_processor=forced)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0
    )


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
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with attach(model):
        both = model.generate(**batch("left", rows), **OPTIONS, **options)
        for number, tokens in enumerate(both.sequences[:, -5:, None]):
            inputs = batch("left", rows[number // 2 : number // 2 + 1])
            forced = [Forced(torch.cat([inputs["input_ids"], tokens.T], -1))]
            alone = model.generate(**inputs, **OPTIONS, logits_processor=forced)
            scores = torch.cat(alone.logits).log_softmax(-1).gather(-1, tokens)
            torch.testing.assert_close(both.sequences_scores[number], scores.mean())


def test_many_questions_about_one_prompt_equal_the_whole_prompts():
    model, inputs = model_of(), batch("left", (0, 1))
    texts = (" What color is it?", " How many objects are there?")
    ids = [prompt([text])["input_ids"].expand(2, -1) for text in texts]
    with attach(model) as session:
        read = session.prefill(inputs)
        for question in ids:
            whole = dict(inputs)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                new = question if name == "input_ids" else torch.full_like(question, 1)
                new = torch.zeros_like(new) if name == "mm_token_type_ids" else new
                whole[name] = torch.cat([inputs[name], new], -1)
            expected = model.generate(**whole, **OPTIONS)
            forced = [Forced(expected.sequences)]
            found = session.ask(read, question, **OPTIONS, logits_processor=forced)
            torch.testing.assert_close(
                torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0
            )
        once = session.ask(read, ids[0], **OPTIONS)
        forced = [Forced(once.sequences.repeat_interleave(2, 0))]
        question = ids[0].repeat_interleave(2, 0)
        twice = session.ask(read, question, **OPTIONS, logits_processor=forced)
        expected = torch.stack(once.logits, 1).repeat_interleave(2, 0)
        torch.testing.assert_close(torch.stack(twice.logits, 1), expected, atol=1e-4, rtol=0)


def test_a_new_video_in_a_later_turn_brings_its_sizes():
    model, first = model_of(), one_video()
    with attach(model):
        out = model.generate(**first, **OPTIONS)
        both = two_turns(first, out.sequences)
        kept = model.generate(**both, **as_argument(cache_of(out)), **OPTIONS)
        anew = model.generate(**both, **OPTIONS, logits_processor=[Forced(kept.sequences)])
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
    length = out.sequences.shape[1]
    sizes = cache._tokenfuse_turn.shares.counts(1000, 1)[:, 0]
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
        tokenfuse.compress(model_of(), one_video(), HALVES, registry=AMONG)


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


def test_a_strategy_with_an_option_of_that_name_is_refused():
    class Mine(Halves):
        attention: str = "flash"

    with pytest.raises(ConfigError, match="strategy halves has an option called attention"):
        attach(model_of(), Mine())


def test_a_part_of_a_chain_cannot_say_how_the_whole_is_read():
    with pytest.raises(ConfigError, match="ttf sets attention; set it at the top"):
        tokenfuse.get_strategy(
            {"compose": [{"strategy": "ttf", "attention": "proportional"}, "uniform"]}
        )
