"""What ``attach`` does to a model, and that nothing of it stays."""

import functools
import threading

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, pipeline

import tokenfuse
from models import (
    ROUNDING,
    Halves,
    Oracle,
    attach,
    batch,
    build,
    compress,
    drop,
    image,
    image_then_video,
    model_of,
    one_image,
    one_video,
    processor,
    prompt,
    two_videos,
    user,
)
from tokenfuse import FusionPlan
from tokenfuse.adapters.qwen3_vl import Qwen3VL
from tokenfuse.errors import (
    AttachError,
    PlanError,
    PromptError,
    UnknownNameError,
    UnsupportedModelError,
)
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.registry import Registry

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    return model_of()


def attributes(model):
    """Names and identities of all that the model object holds itself, and its rope delta."""
    return {name: id(value) for name, value in vars(model).items()}


class Crash(Exception):
    pass


def crash(*args, **kwargs):
    raise Crash


@pytest.mark.parametrize("error", [None, "inside the block", "in the vision tower", "in decoding"])
def test_the_model_is_as_before_after_the_block(error):
    model, inputs = build(), one_video()
    before = model.generate(**inputs, max_new_tokens=6)
    with torch.no_grad():
        logits = model(**inputs).logits
    delta, held = model.model.rope_deltas, attributes(model)
    forward, generate = model.forward, model.generate
    hooked = {"in the vision tower": model.model.visual, "in decoding": model.lm_head}.get(error)
    handle = hooked and hooked.register_forward_pre_hook(crash)
    try:
        with attach(model):
            assert model.generate != generate
            if error == "inside the block":
                model.generate(**inputs, max_new_tokens=2)
                raise Crash
            model.generate(**inputs, max_new_tokens=2)
            model(**inputs)
    except Crash:
        assert error
    else:
        assert not error
    finally:
        if handle:
            handle.remove()
    assert attributes(model) == held
    assert (model.forward, model.generate) == (forward, generate)
    assert model.model.rope_deltas is delta
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), before)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def test_nothing_inside_the_model_is_replaced(model):
    modules = dict(model.named_modules())
    held = {name: attributes(module) for name, module in modules.items() if name}
    with attach(model):
        assert {n: attributes(m) for n, m in model.named_modules() if n} == held


def test_an_override_on_the_instance_is_called_and_restored():
    """accelerate puts its own forward on the instance."""
    model, inputs, calls = build(), one_video(), []
    expected = model.generate(**compress(model, inputs), max_new_tokens=3)
    old = model.forward

    @functools.wraps(old)
    def override(*args, **kwargs):
        calls.append(kwargs)
        return old(*args, **kwargs)

    model.forward = override
    with attach(model):
        ids = model.generate(**inputs, max_new_tokens=3)
    short = expected.shape[1] - 3
    assert torch.equal(ids[:, -3:], expected[:, short:])
    assert len(calls) == 3
    assert model.forward is override
    assert "generate" not in vars(model)


def test_generate_compresses_once_and_hands_every_token_on(model):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with attach(model) as session:
            model.generate(**one_video(), max_new_tokens=3)
    finally:
        handle.remove()
    assert len(calls) == 3
    assert len(session.reports) == 1


def test_nested_use_on_one_model_is_refused(model):
    with attach(model) as outer:
        wrapped = model.generate
        with pytest.raises(AttachError, match="leave the outer with-block first"):
            attach(model)
        with pytest.raises(AttachError, match="leave the outer with-block first"), outer:
            pass
        assert model.generate == wrapped
    assert "generate" not in vars(model)


def test_a_session_can_be_used_again(model):
    session, lengths = attach(model), []
    assert session.report is None
    for inputs in (one_video(), two_videos()):
        with session:
            model.generate(**inputs, max_new_tokens=1)
        lengths.append(session.report.tokens_before)
    assert lengths == [27, 45]


def test_two_models_in_two_threads_do_not_meet():
    models = [build(seed=1), build("moe", seed=2)]
    inputs, strategies = one_video(patches=4), [drop(0.8), Halves()]
    expected = [
        model.generate(**compress(model, inputs, strategy), max_new_tokens=6)[:, -6:]
        for model, strategy in zip(models, strategies, strict=True)
    ]
    barrier, got = threading.Barrier(2), [[], []]

    def work(i):
        with attach(models[i], strategies[i]) as session:
            for _ in range(4):
                barrier.wait()
                ids = models[i].generate(**inputs, max_new_tokens=6)
                got[i].append((ids[:, -6:], session.report.strategy["strategy"]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(got[i]) == 4
        for ids, name in got[i]:
            assert torch.equal(ids, expected[i])
            assert name == strategies[i].name


def test_one_model_cannot_be_attached_in_two_threads(model):
    errors = []

    def work():
        try:
            with attach(model):
                pass
        except AttachError as error:
            errors.append(error)

    with attach(model):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_of_many_threads_that_enter_one_session_one_gets_in(model):
    session = attach(model)
    session.detach()
    start, inside = threading.Barrier(8), []

    def work():
        start.wait()
        try:
            session.__enter__()
            inside.append(1)
        except AttachError:
            inside.append(0)

    for _ in range(20):
        inside.clear()
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(inside) == 1
        session.__exit__(None, None, None)
        assert not tokenfuse.is_attached(model)


def test_leaving_a_block_that_was_not_entered_takes_nobody_elses_session(model):
    first = attach(model)
    first.__exit__(None, None, None)
    assert first.attached
    first.detach()
    with attach(model) as second:
        first.__exit__(None, None, None)
        assert second.attached


@pytest.mark.parametrize("inputs", [one_video(), batch("right")], ids=["one", "batch"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_forward_gives_the_logits_of_the_shorter_prompt(model, inputs, as_tuple):
    with torch.no_grad():
        expected = model(**compress(model, inputs)).logits
        with attach(model) as session:
            out = model(**inputs, return_dict=not as_tuple)
            rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
            same = model(inputs["input_ids"], inputs["attention_mask"], **rest).logits
    assert isinstance(out, tuple) == as_tuple
    assert torch.equal(out[0], expected)
    assert torch.equal(same, expected)
    assert session.report.prompt_after == compress(model, inputs).report.prompt_after


def test_loss_is_that_of_the_surviving_labels(model):
    inputs = batch("right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    visual = inputs["mm_token_type_ids"] != 0
    labels = ids.masked_fill(visual | (mask == 0), -100)
    with torch.no_grad(), attach(model):
        out = model(**inputs, labels=labels)
        logits = model(**inputs).logits
    short = compress(model, inputs)
    kept = []
    for row, real in enumerate(mask.bool()):
        text = labels[row, real][visual[row, real].logical_not()]
        after = short["input_ids"][row][short["attention_mask"][row].bool()]
        is_text = short["mm_token_type_ids"][row][short["attention_mask"][row].bool()] == 0
        assert torch.equal(after[is_text], text)
        target = after.masked_fill(~is_text, -100)
        kept.append((logits[row, : len(target) - 1], target[1:]))
    by_hand = nn.functional.cross_entropy(
        torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])
    )
    torch.testing.assert_close(out.loss, by_hand)


def test_logits_to_keep_counts_from_the_end(model):
    inputs = one_video()
    with torch.no_grad(), attach(model):
        some = model(**inputs, logits_to_keep=3).logits
        torch.testing.assert_close(some, model(**inputs).logits[:, -3:])
        with pytest.raises(PromptError, match="logits_to_keep"):
            model(**inputs, logits_to_keep=torch.tensor([5]))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_positions_of_the_callers_own_are_kept(model, rows):
    """1: text positions, which the model repeats; 3: M-RoPE; 4: with the text row."""
    inputs = image_then_video()
    own, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        video_grid_thw=inputs["video_grid_thw"],
    )
    count = torch.arange(own.shape[-1])[None]
    rope = (count if rows == 1 else own) + 7
    given = torch.cat([count[None], rope]) if rows == 4 else rope
    model.model.rope_deltas = torch.full((1, 1), 999)
    short = compress(model, {**inputs, "position_ids": given})
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    keep[inputs["mm_token_type_ids"] != 0] = torch.cat(
        [plan.keep_mask for modality in ("image", "video") for plan in short.plans[modality]]
    )
    assert torch.equal(short["position_ids"][-3:], rope.expand(3, -1, -1)[:, keep][:, None])
    if rows != 3:
        assert short["position_ids"][0, 0].tolist() == list(range(int(keep.sum())))
    last = int(short["position_ids"][-1, 0, -1])
    assert int(model.model.rope_deltas) == last + 1 - int(keep.sum())
    ids = model.generate(**short, max_new_tokens=3)
    with attach(model):
        same = model.generate(**inputs, position_ids=given, max_new_tokens=3)
    assert torch.equal(same[:, -3:], ids[:, -3:])


def test_text_passes_through_and_the_report_says_so(model):
    inputs = prompt([user("What color is it?")])
    plain = model.generate(**inputs, max_new_tokens=4)
    short = compress(model, inputs)
    assert dict(short) == inputs
    assert short.plans == {}
    assert short.report.reason == "the prompt has no image or video"
    assert short.report.prompt_after == [inputs["input_ids"].shape[1]]
    assert "no image or video" in str(short.report)
    with attach(model) as session:
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain)
        assert session.report.reason == "the prompt has no image or video"
        with torch.no_grad():
            logits = model(**inputs).logits
        said = plain[0, inputs["input_ids"].shape[1]]
        assert logits[0, -1].max() - logits[0, -1, said] <= 2 * ROUNDING
    with attach(model) as session, torch.no_grad():
        model(**inputs)
    assert session.report.reason == "the prompt has no image or video"


def test_a_text_conversation_goes_on_as_without_attach(model):
    inputs = prompt([user("What color is it?")])
    options = {"max_new_tokens": 4, "return_dict_in_generate": True}

    def talk():
        out = model.generate(**inputs, **options)
        ids = torch.cat([out.sequences, inputs["input_ids"]], -1)
        return model.generate(input_ids=ids, **as_argument(cache_of(out)), **options)

    plain = talk().sequences
    with attach(model):
        assert torch.equal(talk().sequences, plain)


def test_a_batch_of_text_and_images_is_compressed_where_it_can_be(model):
    texts = [user("What color is the moving object?"), user("image", "Which color appears first?")]
    inputs = prompt(texts, images=[image(3)])
    short = compress(model, inputs)
    before, after = short.report.prompt_before, short.report.prompt_after
    assert before[0] == after[0]
    assert before[1] > after[1]
    with attach(model):
        ids = model.generate(**inputs, max_new_tokens=4)
    assert Oracle(model, prompt(texts[:1]), {}).says(ids[:1, -4:])


def test_a_stock_pipeline_gives_the_text_of_compress_and_generate(model):
    from PIL import Image

    picture = Image.fromarray(image(5))
    content = [
        {"type": "image", "image": picture},
        {"type": "text", "text": "What color is the moving object?"},
    ]
    with attach(model) as session:
        pipe = pipeline("image-text-to-text", model=model, processor=processor())
        out = pipe(
            text=[{"role": "user", "content": content}],
            generate_kwargs={"max_new_tokens": 8, "do_sample": False},
            return_full_text=False,
        )
    inputs = prompt([user("image", "What color is the moving object?")], images=[picture])
    short = compress(model, inputs)
    ids = model.generate(**short, max_new_tokens=8)[:, short["input_ids"].shape[1] :]
    assert out[0]["generated_text"] == processor().decode(ids[0], skip_special_tokens=True)
    assert session.report.tokens_after < session.report.tokens_before


def test_the_processors_own_container_is_taken(model):
    from transformers import BatchFeature

    inputs = one_image()
    assert torch.equal(
        compress(model, BatchFeature(inputs))["input_ids"], compress(model, inputs)["input_ids"]
    )


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


@pytest.mark.parametrize(
    "other",
    [tiny_llama, lambda: model_of().model, lambda: nn.Linear(2, 2)],
    ids=["llama", "base", "linear"],
)
def test_a_model_without_an_adapter_is_refused(other):
    other = other()
    for use in (attach, lambda m: compress(m, one_video())):
        with pytest.raises(UnsupportedModelError, match="no model family matches"):
            use(other)


def test_an_unknown_strategy_is_refused(model):
    for use in (attach, lambda m, s: compress(m, one_video(), s)):
        with pytest.raises(UnknownNameError, match='did you mean "drop"'):
            use(model, "drp")


def test_a_strategy_is_found_by_name_and_mapping_too(model):
    expected = compress(model, one_video())["input_ids"]
    mapping = {"strategy": "drop", "reduction": 0.5}
    assert torch.equal(compress(model, one_video(), mapping)["input_ids"], expected)
    with attach(model, "drop") as session:
        model.generate(**one_video(), max_new_tokens=1)
    assert session.report.strategy["strategy"] == "drop"


def test_what_an_adapter_cannot_supply_is_said_before_anything_runs(model, monkeypatch):
    monkeypatch.setattr(Qwen3VL, "supplies", frozenset())

    class NeedsSaliency(Halves):
        needs = frozenset({"saliency"})

    class Late(Halves):
        stage = "llm"

    for strategy, said in ((NeedsSaliency(), "needs saliency"), (Late(), "acts at stage llm")):
        with pytest.raises(UnsupportedModelError, match=said):
            attach(model, strategy)
        with pytest.raises(UnsupportedModelError, match=said):
            compress(model, one_video(), strategy)


@pytest.mark.parametrize(
    "plan",
    [
        lambda n: FusionPlan.identity(n + 1),
        lambda n: FusionPlan.from_survivors(torch.arange(n).flip(0), n),
        lambda n: FusionPlan.from_survivors(torch.arange(0), n),
    ],
    ids=["of another length", "out of order", "empty"],
)
def test_a_broken_plan_is_refused_and_the_model_stays_usable(model, plan):
    class Broken(Halves):
        def plan(self, tokens):
            return plan(tokens.num_tokens)

    inputs = one_video()
    plain = model.generate(**inputs, max_new_tokens=3)
    with attach(model, Broken()):
        with pytest.raises(PlanError):
            model.generate(**inputs, max_new_tokens=3)
        with pytest.raises(PlanError):
            model(**inputs)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), plain)


def test_plugins_observe_each_plan_and_report(model):
    seen = []

    class Observer:
        @tokenfuse.hookimpl
        def tokenfuse_planned(self, tokens, plan, strategy):
            seen.append((tokens.num_tokens, plan.num_kept, strategy.name))

        @tokenfuse.hookimpl
        def tokenfuse_compressed(self, report):
            seen.append(report)

    among = Registry([Observer()], installed=False)
    short = tokenfuse.compress(model, two_videos(), Halves(), registry=among)
    assert seen == [(18, 9, "halves"), (27, 14, "halves"), short.report]


def test_a_single_image_says_why_it_was_not_compressed(model):
    report = compress(model, one_image(), drop(0.0)).report
    assert report.reason == "the strategy kept every token"
    report = compress(model, one_image(), {"strategy": "ttf", "keep_ratio": 0.2}).report
    assert report.reason == "one frame only, and ttf compares frames"
    assert report.items[0].reason == report.reason
