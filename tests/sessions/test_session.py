"""A session as a handle: attached at once, detached for certain, and not inherited by copies."""

import copy
import functools
import gc
import io
import pickle
import threading
import weakref

import pytest
import timm
import torch
from torch import nn
from transformers import DynamicCache, pipeline

import tokenfuse
from families import FAMILIES
from models import (
    AMONG,
    Halves,
    attach,
    build,
    compress,
    drop,
    model_of,
    one_image,
    one_video,
    processor,
    prompt,
    two_videos,
    user,
)
from tokenfuse.config import Configuration
from tokenfuse.errors import AttachError, PromptError, UnsupportedModelError
from tokenfuse.prompt.cache import as_argument, cache_of

HALVES = Configuration(Halves(), attention="proportional")


def lengths(model, inputs=None):
    """How long a prompt is when the language model reads it."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        model.generate(**(inputs or one_video()), max_new_tokens=1)
    finally:
        handle.remove()
    return seen[0]


WHOLE = one_video()["input_ids"].shape[1]


def test_attach_acts_at_once_and_detach_ends_it():
    model = build()
    before = dict(vars(model))
    session = attach(model)
    assert tokenfuse.is_attached(model)
    assert lengths(model) < WHOLE
    assert repr(session) == "Session(drop on qwen3_vl, attached)"
    session.detach()
    assert vars(model) == before
    assert not tokenfuse.is_attached(model)
    assert lengths(model) == WHOLE
    assert repr(session) == "Session(drop on qwen3_vl, detached)"
    for call in (session.detach, lambda: session.prefill(one_video())):
        with pytest.raises(AttachError, match="on a session that is detached"):
            call()


def test_a_block_detaches_also_where_the_session_was_detached_in_it():
    model = build()
    with attach(model) as session:
        session.detach()
    with session:
        assert lengths(model) < WHOLE
    assert not tokenfuse.is_attached(model)


def test_a_session_that_nobody_holds_goes_on_with_its_model_and_ends_with_it():
    model = build()
    attach(model)
    gc.collect()
    assert tokenfuse.is_attached(model)
    assert lengths(model) < WHOLE
    with pytest.raises(AttachError, match="already attached"):
        attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_reports_are_the_last_hundred():
    model = build()
    with attach(model) as session:
        for _ in range(102):
            model(**one_image(), logits_to_keep=1)
    assert len(session.reports) == 100
    assert session.reports[-1] is session.report


def test_a_wrapper_of_somebody_else_stays_and_calls_the_model():
    model = build()
    session = attach(model)
    inner = model.forward

    @functools.wraps(inner)
    def theirs(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = theirs
    session.detach()
    assert model.forward is theirs
    assert lengths(model) == WHOLE


def test_a_session_that_is_entered_again_acts_once_through_a_wrapper_that_stayed():
    model = build()
    session = attach(model)
    inner = model.forward

    @functools.wraps(inner)
    def theirs(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = theirs
    session.detach()
    with session, torch.no_grad():
        logits = model(**one_video()).logits
    assert len(session.reports) == 1
    assert logits.shape[1] < WHOLE


def test_a_pipeline_stands_for_its_model():
    model = build()
    pipe = pipeline("image-text-to-text", model=model, processor=processor())
    with tokenfuse.attach(pipe, "uniform", keep_ratio=0.5) as session:
        assert session.model is model


# Copies


def vit_of():
    return timm.create_model("vit_tiny_patch16_224", depth=2).eval()


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_an_attached_model_is_not_attached(kind):
    model = build()
    with attach(model, HALVES):
        double = COPIES[kind](model)
        assert not tokenfuse.is_attached(double)
        assert vars(double).keys() == vars(build()).keys()
        assert lengths(double) == WHOLE
        with attach(double):
            assert lengths(double) < WHOLE
        assert lengths(model) < WHOLE
    if kind != "copy":
        double.lm_head.weight.data.zero_()
        with torch.no_grad():
            assert double(**one_video()).logits.abs().max() == 0


def test_torch_saves_an_attached_model_as_one_that_is_not():
    for model, arguments in ((build(), (HALVES,)), (vit_of(), ("tome",))):
        with tokenfuse.attach(model, *arguments, registry=AMONG):
            file = io.BytesIO()
            torch.save(model, file)
        file.seek(0)
        double = torch.load(file, weights_only=False)
        assert not tokenfuse.is_attached(double)
        assert double.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_of_an_attached_vision_transformer_merges_nothing(kind):
    vit, images = vit_of(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        plain = vit(images)
        with tokenfuse.attach(vit, "tome", r=16) as session:
            double = COPIES[kind](vit)
            merged = vit(images)
            assert session.tokens == [197, 181]
            session.tokens.clear()
            assert torch.equal(double(images), plain)
            assert session.tokens == []
    assert not torch.equal(merged, plain)
    assert repr(session) == "VitSession(tome on timm_vit, detached)"


def test_two_threads_merge_their_own_images():
    vit, images = vit_of(), [torch.randn(n, 3, 224, 224) for n in (1, 3)]
    meet = threading.Barrier(2)

    def wait(*_):
        meet.wait(30)

    handle = vit.blocks[0].mlp.register_forward_pre_hook(wait)
    found = [None, None]
    with tokenfuse.attach(vit, "tome", r=16) as session:

        def work(i):
            with torch.no_grad():
                found[i] = vit(images[i]), session.plan.num_source

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
        for i, (output, tokens) in enumerate(found):
            assert tokens == len(images[i]) * 197
            with torch.no_grad():
                torch.testing.assert_close(output, vit(images[i]))


def test_data_parallel_replicas_are_refused():
    model = build()
    with attach(model), pytest.raises(AttachError, match="DataParallel copies an attached model"):
        model._replicate_for_data_parallel()
    assert model._replicate_for_data_parallel() is not model


# What would go wrong without a word


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_a_wrapper_of_a_model_is_told_the_model_inside():
    wrapped = Holder(Holder(build()))
    for use in (attach, lambda model: compress(model, one_video())):
        with pytest.raises(
            UnsupportedModelError,
            match=r"holds a Qwen3VLForConditionalGeneration, .* expected model\.inner\.inner",
        ):
            use(wrapped)


def test_a_cache_that_lost_its_record_is_refused():
    model, inputs = build(), one_video(patches=4)
    with attach(model, drop(0.95)):
        out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        layers = [(layer.keys, layer.values) for layer in cache_of(out).layers]
        bare = DynamicCache(layers)
        ids = torch.cat([out.sequences, out.sequences[:, -1:]], -1)
        with pytest.raises(PromptError, match="has lost what tokenfuse noted on it"):
            model.generate(input_ids=ids, **as_argument(bare), max_new_tokens=1)


def test_embeddings_in_place_of_ids_are_reported_as_they_are():
    model, inputs = build(), one_video()
    with attach(model) as session:
        model.generate(**inputs, max_new_tokens=1)
        text = prompt([user("What color is it?")])["input_ids"]
        embeds = model.get_input_embeddings()(text)
        model.generate(inputs_embeds=embeds, max_new_tokens=1)
        assert "inputs_embeds" in session.report.reason
        assert session.report.prompt_before == session.report.prompt_after == [text.shape[1]]
        assert session.columns is None


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")


def compiled_decoder(model):
    layer = model.get_decoder().layers[0]
    layer.forward = torch.compile(layer.forward, backend="eager")


@pytest.mark.parametrize("prepare", [compiled_forward, compiled_in_place, compiled_decoder])
def test_hooks_that_compiled_code_would_skip_are_refused(prepare):
    model = build()
    prepare(model)
    with pytest.raises(UnsupportedModelError, match="compiled before"):
        attach(model, HALVES)
    with attach(model):
        assert tokenfuse.is_attached(model)


def test_a_vision_transformer_that_was_compiled_and_run_is_refused():
    vit = vit_of()
    fast = torch.compile(vit, backend="eager")
    with torch.no_grad():
        fast(torch.randn(1, 3, 224, 224))
    try:
        with pytest.raises(UnsupportedModelError, match=r"torch\.compiler\.reset\(\)"):
            tokenfuse.attach(vit, "tome", r=16)
    finally:
        torch.compiler.reset()
    with tokenfuse.attach(vit, "tome", r=16) as session, torch.no_grad():
        fast(torch.randn(1, 3, 224, 224))
        assert session.tokens == [197, 181]
    torch.compiler.reset()


def test_columns_say_what_attentions_and_hidden_states_are_of():
    model, inputs = build(attention="eager"), one_video()
    with attach(model) as session, torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
        assert out.attentions[0].shape[-1] == session.columns.shape[1]
        assert out.hidden_states[0].shape[1] == session.columns.shape[1]
        kept = inputs["input_ids"].gather(-1, session.columns)
        assert torch.equal(kept, compress(model, inputs)["input_ids"])


# What compress returns


def test_compressed_inputs_keep_their_report_when_copied():
    short = compress(model_of(), two_videos())
    for double in (short.copy(), copy.copy(short), copy.deepcopy(short), short.to("cpu")):
        assert type(double) is tokenfuse.CompressedInputs
        assert double.report == short.report
        assert torch.equal(double.columns, short.columns)
        assert torch.equal(double["input_ids"], short["input_ids"])
        plans = zip(double.plans["video"], short.plans["video"], strict=True)
        assert all(torch.equal(a.target, b.target) for a, b in plans)
    again = pickle.loads(pickle.dumps(short))
    assert again.report == short.report
    features = again["mm_encoder_outputs"]["video"].pooler_output
    assert not any(x.requires_grad for x in features)
    cached = compress(model_of(), two_videos() | as_argument(DynamicCache()))
    (name,) = as_argument(None)
    assert copy.deepcopy(cached)[name] is not cached[name]
    assert type({**short}) is dict
    before, after = short.report.prompt_before[0], short.report.prompt_after[0]
    assert repr(short).startswith(f"CompressedInputs({before} -> {after} tokens: ")
    moved = short.to("meta")
    outputs = moved["mm_encoder_outputs"]["video"]
    tensors = [moved["input_ids"], moved.columns, moved.turn.mask, *outputs.pooler_output]
    assert {x.device.type for x in tensors} == {"meta"}


# What an earlier turn has read


@pytest.fixture
def read():
    """How many patches the vision tower reads, call by call."""
    model, patches = build(), []

    def note(_, args, kwargs):
        patches.append(len(args[0] if args else kwargs["hidden_states"]))

    model.model.visual.register_forward_pre_hook(note, with_kwargs=True)
    return model, patches


def test_a_later_turn_encodes_only_the_new_video(read):
    model, patches = read
    first, both = one_video(), two_videos()
    with attach(model) as session:
        out = model.generate(**first, max_new_tokens=2, return_dict_in_generate=True)
        whole = {name: torch.cat([first[name], both[name]]) for name in VIDEO}
        whole["input_ids"] = torch.cat([out.sequences, both["input_ids"]], -1)
        said = torch.zeros_like(out.sequences[:, first["input_ids"].shape[1] :])
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            whole[name] = torch.cat([first[name], said + fill, both[name]], -1)
        model.generate(**whole, **as_argument(cache_of(out)), max_new_tokens=1)
    assert patches == [len(first[VIDEO[0]]), len(both[VIDEO[0]])]
    assert session.report.encoded_again == 0
    assert [item.tokens_before for item in session.report.items] == [27, 18, 27]


VIDEO = ("pixel_values_videos", "video_grid_thw")


def test_surplus_pixels_in_a_later_turn_are_refused():
    family = FAMILIES["llava"]
    model = family.build("sdpa")
    first = family.prompt([[("text", 1), ("image", 1), ("text", 2), ("image", 2), ("text", 3)]])
    with tokenfuse.attach(model, "uniform", keep_ratio=0.5):
        out = model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)
        more = family.prompt([[("text", 6), ("image", 4), ("text", 7)]])
        whole = {
            "input_ids": torch.cat([out.sequences, more["input_ids"]], -1),
            "pixel_values": torch.cat([first["pixel_values"], more["pixel_values"]]),
        }
        later = whole | as_argument(copy.deepcopy(cache_of(out)))
        assert model.generate(**later, max_new_tokens=1).shape[1] > whole["input_ids"].shape[1]
        whole["pixel_values"] = torch.cat([whole["pixel_values"], more["pixel_values"]])
        with pytest.raises(PromptError, match="placeholder"):
            model.generate(**whole, **as_argument(cache_of(out)), max_new_tokens=1)
