"""``generate`` on shorter prompts: every way to decode, and later turns on the same cache."""

import copy
import inspect
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StaticCache,
    StoppingCriteria,
)

from models import (
    Oracle,
    attach,
    batch,
    build,
    compress,
    frames,
    model_of,
    one_video,
    processor,
    prompt,
    two_videos,
    user,
)
from tokenfuse.errors import PromptError
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.sessions.arguments import for_shorter_prompt

pytestmark = pytest.mark.usefixtures("one_thread")


def length(inputs):
    return inputs["input_ids"].shape[1]


def answers(model, inputs, **options):
    """Tokens after the prompt by ``attach``, and by ``compress`` and ``generate``."""
    torch.manual_seed(0)
    with attach(model):
        ids = model.generate(**inputs, **options)
    times = len(ids) // len(inputs["input_ids"])
    begins = inputs["input_ids"].repeat_interleave(times, 0)
    assert torch.equal(ids[:, : length(inputs)], begins)
    torch.manual_seed(0)
    short = compress(model, inputs)
    explicit = model.generate(**short, **options)
    return ids[:, length(inputs) :], explicit[:, length(short) :]


@pytest.fixture
def model():
    return model_of()


@pytest.mark.parametrize("inputs", [one_video(), batch()], ids=["one", "batch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_k": 50},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"use_cache": False},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    ],
    ids=lambda options: " ".join(map(str, options)) or "greedy",
)
def test_attach_gives_what_compress_and_generate_give(model, inputs, options):
    mine, explicit = answers(model, inputs, max_new_tokens=6, **options)
    assert torch.equal(mine, explicit)
    assert mine.shape[1] == 6


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"use_cache": False}],
    ids=str,
)
def test_the_kind_of_cache_does_not_change_the_tokens(model, options):
    inputs = batch()
    mine, _ = answers(model, inputs, max_new_tokens=6, **options)
    assert Oracle(model, inputs, compress(model, inputs).plans).says(mine)


def test_prompt_lookup_decoding_gives_the_greedy_tokens(model):
    inputs = one_video()
    mine, _ = answers(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=2)
    assert Oracle(model, inputs, compress(model, inputs).plans).says(mine)


def test_several_answers_are_those_to_the_right_prompts(model):
    """Beams of one row must not read another row's videos."""
    inputs = batch()
    plans = compress(model, inputs).plans
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    with attach(model):
        out = model.generate(**inputs, **options, num_beams=3, num_return_sequences=3)
    for beam in range(3):
        tokens = out.sequences[beam::3, length(inputs) :]
        scores = Oracle(model, inputs, plans).follow(tokens).log_softmax(-1)
        expected = scores.gather(-1, tokens[..., None])[..., 0].mean(-1)
        torch.testing.assert_close(out.sequences_scores[beam::3], expected, atol=1e-4, rtol=0)


def test_positional_arguments_and_inputs_mean_the_same(model):
    inputs = one_video()
    expected, _ = answers(model, inputs, max_new_tokens=5)
    config = GenerationConfig(max_new_tokens=5, pad_token_id=0, do_sample=False)
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with attach(model):
        for ids in (
            model.generate(inputs["input_ids"], config, **rest),
            model.generate(inputs=inputs["input_ids"], generation_config=config, **rest),
        ):
            assert torch.equal(ids[:, length(inputs) :], expected)
        with pytest.raises(TypeError):
            model.generate(*[None] * 20, **inputs)
        with pytest.raises(PromptError, match="leave inputs out"):
            model.generate(inputs["input_ids"], **inputs, max_new_tokens=5)


@pytest.mark.parametrize("mask", [lambda m: m.bool(), lambda m: m.float(), lambda m: m.int()])
def test_masks_of_any_dtype_mean_the_same(model, mask):
    inputs = batch()
    expected, _ = answers(model, inputs, max_new_tokens=5)
    other = {**inputs, "attention_mask": mask(inputs["attention_mask"])}
    mine, explicit = answers(model, other, max_new_tokens=5)
    assert torch.equal(mine, expected)
    assert torch.equal(explicit, expected)


def test_no_mask_means_no_padding(model):
    inputs = one_video()
    expected, _ = answers(model, inputs, max_new_tokens=5)
    del inputs["attention_mask"]
    mine, _ = answers(model, inputs, max_new_tokens=5)
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("where", ["keyword", "config", "model"])
def test_lengths_count_the_callers_prompt(where):
    model, inputs = build(), batch()
    limits = {"max_length": length(inputs) + 7, "min_length": length(inputs) + 4}
    first = compress(model, inputs)
    token = int(model.generate(**first, max_new_tokens=1)[0, -1])
    # The first row would end at once, were it not for min_length.
    model.generation_config.eos_token_id = token
    config = GenerationConfig(do_sample=False, eos_token_id=token)
    options = limits
    if where == "config":
        config.update(**limits)
        options = {"generation_config": config}
    elif where == "model":
        model.generation_config.update(**limits)
        options = {}
    before = [copy.deepcopy(c.to_dict()) for c in (config, model.generation_config)]
    with attach(model):
        ids = model.generate(**inputs, **options)
    answer = ids[:, length(inputs) :]
    assert answer.shape[1] == 7
    assert (answer[:, :4] != token).all()
    assert [c.to_dict() for c in (config, model.generation_config)] == before
    with attach(model), pytest.raises(ValueError, match="max_length"):
        model.generate(**inputs, max_length=length(inputs))


def test_max_new_tokens_counts_new_tokens_whatever_the_prompt(model):
    config = GenerationConfig(max_new_tokens=3)
    with attach(model):
        ids = model.generate(**one_video(), generation_config=config)
    assert ids.shape[1] == length(one_video()) + 3
    assert config.max_new_tokens == 3


class Recorder:
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_sees_the_callers_prompt_then_each_token(model):
    inputs, recorder = one_video(), Recorder()
    with attach(model):
        ids = model.generate(**inputs, max_new_tokens=5, streamer=recorder)
    assert torch.equal(recorder.values[0], inputs["input_ids"])
    assert torch.cat(recorder.values[1:]).tolist() == ids[0, length(inputs) :].tolist()
    assert len(recorder.values) == 6
    assert recorder.ended


class SeesIds(LogitsProcessor, StoppingCriteria):
    def __init__(self, stop_at=None):
        self.stop_at, self.seen = stop_at, []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids)
        if isinstance(scores, torch.Tensor) and self.stop_at is None:
            return scores
        return torch.full((len(input_ids),), input_ids.shape[1] >= (self.stop_at or 10**9))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_callers_processors_and_criteria_see_his_prompt(model, beams):
    inputs, processor, criterion = batch(), SeesIds(), SeesIds(length(batch()) + 4)
    with attach(model):
        ids = model.generate(
            **inputs,
            max_new_tokens=9,
            num_beams=beams,
            logits_processor=[processor],
            stopping_criteria=[criterion],
        )
    begins = inputs["input_ids"]
    for seen in (*processor.seen, *criterion.seen):
        times = len(seen) // len(begins)
        assert torch.equal(seen[:, : length(inputs)], begins.repeat_interleave(times, 0))
    assert ids.shape[1] == length(inputs) + 4


def test_what_stands_in_for_the_callers_objects_can_be_copied_and_asked(model):
    """transformers copies criteria, and asks them for attributes such as eos_token_id."""
    prompt, short = torch.zeros(1, 5).long(), torch.zeros(1, 3).long()
    given = {"stopping_criteria": [SeesIds(7)]}
    moved = for_shorter_prompt(given, prompt, short, model.generation_config)
    (view,) = copy.deepcopy(moved["stopping_criteria"])
    assert view.stop_at == 7
    assert not hasattr(view, "eos_token_id")
    assert not view(torch.zeros(1, 4).long(), None)
    assert view(torch.zeros(1, 5).long(), None)


def test_transformers_own_objects_that_count_the_prompt_are_moved(model):
    inputs = one_video()
    criterion = MaxLengthCriteria(length(inputs) + 4)
    with attach(model):
        ids = model.generate(**inputs, max_new_tokens=9, stopping_criteria=[criterion])
    assert ids.shape[1] == length(inputs) + 4
    assert criterion.max_length == length(inputs) + 4

    token = int(ids[0, length(inputs)])
    processor = MinLengthLogitsProcessor(length(inputs) + 2, token)
    with attach(model):
        ids = model.generate(**inputs, logits_processor=[processor], max_new_tokens=4)
    assert (ids[0, length(inputs) :][:2] != token).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2}])
def test_a_prefix_function_sees_the_callers_prompt(model, options):
    inputs, seen = batch(), []

    def allowed(number, ids):
        seen.append((number, ids))
        return list(range(100, 140))

    options = {"do_sample": "num_return_sequences" in options, **options}
    with attach(model):
        ids = model.generate(
            **inputs, max_new_tokens=3, prefix_allowed_tokens_fn=allowed, **options
        )
    assert ((ids[:, length(inputs) :] >= 100) & (ids[:, length(inputs) :] < 140)).all()
    assert seen
    for number, one in seen:
        times = options.get("num_return_sequences", 1)
        assert torch.equal(one[: length(inputs)], inputs["input_ids"][number // times])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_the_dictionary_holds_the_callers_sequences_and_as_many_scores(model, options):
    inputs = batch()
    with attach(model):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    times = options.get("num_return_sequences", 1)
    begins = inputs["input_ids"].repeat_interleave(times, 0)
    assert torch.equal(out.sequences[:, : length(inputs)], begins)
    assert torch.equal(out["sequences"], out.sequences)
    assert len(out.scores) == 4
    scores = model.compute_transition_scores(
        out.sequences, out.scores, out.get("beam_indices"), normalize_logits=not options
    )
    assert scores.shape == (len(out.sequences), 4)


# Later turns


def tokens(text, rows=1):
    return processor().tokenizer([text] * rows, return_tensors="pt")["input_ids"]


TURNS = ("user\nWhat color is the moving object?", "user\nWhich?", "user\nHow many objects?")


def ways(inputs, first):
    """The arguments by which callers bring a conversation back, beside ids and cache."""
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(first.shape)], -1)
    pixels = {k: v for k, v in inputs.items() if "pixel" in k or "grid" in k}
    types = inputs["mm_token_type_ids"]
    types = torch.cat([types, types.new_zeros(first.shape)], -1)
    return {
        "ids": {},
        "mask": {"attention_mask": mask},
        "bool mask": {"attention_mask": mask.bool()},
        "all": {"attention_mask": mask, "mm_token_type_ids": types, **pixels},
    }


@pytest.mark.parametrize(
    ("make", "way", "cache"),
    [
        (one_video, "ids", "own"),
        (one_video, "mask", "given"),
        (one_video, "all", "own"),
        (two_videos, "ids", "static"),
        (two_videos, "all", "given"),
        (batch, "ids", "own"),
        (batch, "mask", "own"),
        (batch, "bool mask", "static"),
        (batch, "mask", "given"),
        (batch, "all", "own"),
    ],
)
def test_later_turns_equal_one_pass_over_the_conversation(model, make, way, cache):
    inputs = make()
    oracle = Oracle(model, inputs, compress(model, inputs).plans)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    given = {
        "own": None,
        "given": DynamicCache(config=model.config.text_config),
        "static": StaticCache(config=model.config.text_config, max_cache_len=160),
    }[cache]
    with attach(model):
        arguments, ids = inputs, inputs["input_ids"]
        for turn in (*TURNS, None):
            out = model.generate(**{**arguments, "input_ids": ids, **as_argument(given)}, **options)
            assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
            said, before = out.sequences[:, ids.shape[1] :], copy.copy(oracle)
            assert before.says(said)
            logits = oracle.follow(said)
            torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-4, rtol=0)
            given = cache_of(out)
            if turn is not None:
                new = tokens(turn, len(ids))
                oracle.append(new)
                ids = torch.cat([out.sequences, new], -1)
                arguments = ways(inputs, ids[:, length(inputs) :])[way]


def test_later_turns_may_be_padded_within_the_conversation(model):
    inputs = batch()
    oracle = Oracle(model, inputs, compress(model, inputs).plans)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True}
    new = tokens(TURNS[0], 3)
    later = torch.ones_like(new)
    later[1, :4] = 0
    with attach(model):
        out = model.generate(**inputs, **options)
        assert oracle.says(out.sequences[:, length(inputs) :])
        answered = torch.ones(3, 5, dtype=torch.long)
        answered[0, 3:] = 0  # as if the first answer had ended early
        ids = torch.cat([out.sequences, new], -1)
        mask = torch.cat([inputs["attention_mask"], answered, later], -1)
        out = model.generate(
            input_ids=ids, attention_mask=mask, **as_argument(cache_of(out)), **options
        )
    # The answer was read when it was written; what its mask hides since, later tokens do not see.
    oracle.seen[:, -5:] = answered.bool()
    oracle.real[:, -5:] = answered.bool()
    oracle.append(new, later)
    assert oracle.says(out.sequences[:, ids.shape[1] :])


def test_a_copied_cache_is_continued_too(model):
    """Copying the cache is how transformers reuses one prompt for several questions."""
    inputs, options = one_video(), {"max_new_tokens": 5, "return_dict_in_generate": True}
    with attach(model):
        out = model.generate(**inputs, **options)
        for turn in TURNS:
            ids = torch.cat([out.sequences, tokens(turn)], -1)
            cache = copy.deepcopy(cache_of(out))
            later = model.generate(input_ids=ids, **as_argument(cache), **options)
            oracle = Oracle(model, inputs, compress(model, inputs).plans)
            oracle.append(ids[:, length(inputs) :])
            assert oracle.says(later.sequences[:, ids.shape[1] :])


def test_a_turn_continues_where_another_prompt_came_between(model):
    inputs, options = one_video(), {"max_new_tokens": 5, "return_dict_in_generate": True}
    with attach(model):
        out = model.generate(**inputs, **options)
        model.generate(**two_videos(), **options)
        ids = torch.cat([out.sequences, tokens(TURNS[0])], -1)
        later = model.generate(input_ids=ids, **as_argument(cache_of(out)), **options)
    oracle = Oracle(model, inputs, compress(model, inputs).plans)
    oracle.append(ids[:, length(inputs) :])
    assert oracle.says(later.sequences[:, ids.shape[1] :])


def test_lengths_of_a_later_turn_count_the_whole_conversation(model):
    inputs = one_video()
    with attach(model):
        out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, tokens(TURNS[0])], -1)
        later = model.generate(
            input_ids=ids, **as_argument(cache_of(out)), max_length=ids.shape[1] + 3
        )
    assert later.shape[1] == ids.shape[1] + 3


def test_an_emptied_cache_takes_a_new_prompt(model):
    cache = DynamicCache(config=model.config.text_config)
    with attach(model):
        model.generate(**one_video(), **as_argument(cache), max_new_tokens=3)
        cache.reset()
        ids = model.generate(**two_videos(), **as_argument(cache), max_new_tokens=3)
        assert torch.equal(ids, model.generate(**two_videos(), max_new_tokens=3))


def test_explicit_compression_leaves_the_delta_that_transformers_own_second_turn_needs(model):
    """Without it the second turn's positions would be negative."""
    inputs = batch()
    oracle = Oracle(model, inputs, compress(model, inputs).plans)
    short = compress(model, inputs)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True}
    out = model.generate(**short, **options)
    assert oracle.says(out.sequences[:, length(short) :])
    new = tokens(TURNS[0], 3)
    oracle.append(new)
    ids = torch.cat([out.sequences, new], -1)
    tail = short["attention_mask"].new_ones(3, 5 + new.shape[1])
    mask = torch.cat([short["attention_mask"], tail], -1)
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        later = model.generate(
            input_ids=ids, attention_mask=mask, **as_argument(cache_of(out)), **options
        )
    finally:
        handle.remove()
    assert all(int(positions.min()) >= 0 for positions in seen)
    end = oracle.positions[..., -1:]
    assert torch.equal(seen[0][-1:, :, -1:], end[-1:])
    assert oracle.says(later.sequences[:, ids.shape[1] :])


def test_a_prompt_filled_by_forward_is_continued_by_generate(model):
    inputs = one_video()
    with attach(model):
        cache = cache_of(model(**inputs, use_cache=True))
        ids = torch.cat([inputs["input_ids"], tokens(TURNS[0])], -1)
        out = model.generate(input_ids=ids, **as_argument(cache), max_new_tokens=5)
    oracle = Oracle(model, inputs, compress(model, inputs).plans)
    oracle.append(tokens(TURNS[0]))
    assert oracle.says(out[:, ids.shape[1] :])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_the_old_name_of_a_cache_is_understood(model, call):
    """transformers renamed ``past_key_values`` to ``cache`` in 5.24, and takes both."""
    new = tokens(TURNS[0])

    def later(name, out):
        given = {name: copy.deepcopy(cache_of(out))}
        if call == "forward":
            return model(input_ids=new, **given).logits
        return model.generate(
            input_ids=torch.cat([out.sequences, new], -1), max_new_tokens=4, **given
        )

    with attach(model):
        out = first_turn(model)
        (name,) = as_argument(None)
        assert torch.equal(later("past_key_values", out), later(name, out))


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("as_tuple", [True, False])
def test_a_loop_of_forwards_equals_the_oracle(model, side, as_tuple):
    inputs = batch(side) if side else two_videos()
    oracle = Oracle(model, inputs, compress(model, inputs).plans)
    options = {"use_cache": True, "return_dict": not as_tuple}
    cache, mask = DynamicCache(config=model.config.text_config), inputs["attention_mask"]
    rows = len(mask)
    with attach(model), torch.no_grad():
        model(**inputs, **as_argument(cache), **options)
        for new in tokens(TURNS[0], rows).split(2, dim=-1):
            mask = torch.cat([mask, mask.new_ones(new.shape)], -1)
            masked = {"attention_mask": mask} if side else {}
            out = model(input_ids=new, **as_argument(cache), **masked, **options)
            oracle.append(new)
            got = (out[0] if as_tuple else out.logits)[:, -1]
            torch.testing.assert_close(got, oracle.logits()[:, -1], atol=1e-4, rtol=0)


# Conversations that cannot go on


def first_turn(model, inputs=None, **options):
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, **options}
    return model.generate(**(inputs or one_video()), **options)


def test_a_new_video_without_the_pixels_of_the_whole_conversation_is_refused(model):
    other = prompt([user("video", "Which?")], videos=[frames(8)])
    with attach(model):
        out = first_turn(model)
        ids = torch.cat([out.sequences, other["input_ids"]], -1)
        rest = {k: other[k] for k in ("pixel_values_videos", "video_grid_thw")}
        with pytest.raises(PromptError, match="takes the processor's output for the whole"):
            model.generate(input_ids=ids, **as_argument(cache_of(out)), **rest)
        with pytest.raises(
            PromptError, match="a later call of the model brings a new image or video"
        ):
            model(input_ids=other["input_ids"], **as_argument(cache_of(out)), **rest)


def test_a_video_after_a_text_only_turn_is_compressed(model):
    said = prompt([user("Hello")])
    with attach(model) as session:
        out = first_turn(model, said)
        assert session.report.reason == "the prompt has no image or video"
        shown = one_video()
        gap = torch.zeros_like(out.sequences)
        whole = {k: v for k, v in shown.items() if "video" in k}
        for name, before in (
            ("input_ids", out.sequences),
            ("attention_mask", torch.ones_like(gap)),
            ("mm_token_type_ids", gap),
        ):
            whole[name] = torch.cat([before, shown[name]], -1)
        later = model.generate(**whole, **as_argument(cache_of(out)), max_new_tokens=5)
        assert session.report.tokens_after < session.report.tokens_before
    oracle = Oracle(model, whole, compress(model, whole).plans)
    assert oracle.says(later[:, length(whole) :])


def test_the_text_prompt_in_a_cache_keeps_its_positions_whatever_came_between(model):
    """The model's own rope delta is that of the prompt which it read last."""
    said = prompt([user("Hello, what is this?")])
    expected = model.generate(**said, max_new_tokens=4, return_dict_in_generate=True)
    ids = torch.cat([expected.sequences, tokens(TURNS[0])], -1)
    expected = model.generate(input_ids=ids, **as_argument(cache_of(expected)), max_new_tokens=5)
    with attach(model) as session:
        first = session.prefill(said)
        out = first_turn(model, said)
        for between in (one_video(), two_videos()):
            model.generate(**between, max_new_tokens=2)
            cache = copy.deepcopy(cache_of(out))
            assert torch.equal(
                model.generate(input_ids=ids, **as_argument(cache), max_new_tokens=5), expected
            )
            rest = ids[:, length(said) :]
            asked, oracle = session.ask(first, rest, max_new_tokens=5), Oracle(model, said, {})
            oracle.append(rest)
            assert oracle.says(asked[:, ids.shape[1] :])


def test_a_cache_of_text_is_used_as_without_a_session(model):
    """Cropped, or with positions of the caller's own."""
    said = prompt([user("Hello, what is this?")])

    def talk():
        out = model.generate(**said, max_new_tokens=6, return_dict_in_generate=True)
        cache_of(out).crop(-8)
        ids = torch.cat([out.sequences[:, :-4], tokens(TURNS[0])], -1)
        second = model.generate(
            input_ids=ids,
            **as_argument(cache_of(out)),
            max_new_tokens=4,
            return_dict_in_generate=True,
        )
        cache_of(second).crop(-3)
        ids = torch.cat([second.sequences[:, :-1], tokens(TURNS[1])], -1)
        positions = torch.arange(ids.shape[1]).expand(4, 1, -1)
        return model.generate(
            input_ids=ids,
            **as_argument(cache_of(second)),
            position_ids=positions,
            max_new_tokens=4,
        )

    plain = talk()
    with attach(model):
        assert torch.equal(talk(), plain)


def test_padding_of_a_later_turn_without_a_mask_is_hidden(model):
    """As generate hides it: an answer that ended early is followed by padding."""
    inputs, pad = batch(rows=(0, 1)), model.generation_config.pad_token_id
    with attach(model) as session:
        out = first_turn(model, inputs)
        ids = torch.cat([out.sequences, tokens(TURNS[0], 2)], -1)
        ids[0, length(inputs) + 4 : length(inputs) + 6] = pad
        mask = torch.cat([inputs["attention_mask"], (ids[:, length(inputs) :] != pad).long()], -1)
        caches = [copy.deepcopy(cache_of(out)) for _ in range(2)]
        options = {"input_ids": ids, "max_new_tokens": 4}
        told = model.generate(**options, **as_argument(caches[0]), attention_mask=mask)
        assert torch.equal(told, model.generate(**options, **as_argument(caches[1])))
        prompts, question = session.prefill(inputs), tokens(TURNS[1], 2)
        question[0, :2] = pad
        padded = session.ask(prompts, question, (question != pad).long(), max_new_tokens=4)
        assert torch.equal(padded, session.ask(prompts, question, max_new_tokens=4))


def test_positions_of_a_later_turn_that_shows_something_are_refused(model):
    with attach(model):
        out = first_turn(model)
        whole = two_videos()
        whole["input_ids"] = torch.cat([out.sequences, whole["input_ids"]], -1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        whole["mm_token_type_ids"] = torch.zeros_like(whole["input_ids"])
        positions = torch.zeros(3, *whole["input_ids"].shape, dtype=torch.long)
        with pytest.raises(PromptError, match="brings position_ids"):
            model.generate(**whole, position_ids=positions, **as_argument(cache_of(out)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_contiguous_positions_go_on_after_a_padded_prompt(model, side):
    """A second turn that shows something, right after prompts of unequal lengths."""
    rows = (0, 1)
    inputs, options = batch(side, rows), {"positions": "contiguous"}
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        with attach(model, **options):
            out = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
            new = prompt([user("video", "Which?")], videos=[frames(8)])
            whole = dict(inputs)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                first = out.sequences if name == "input_ids" else inputs[name]
                if name != "input_ids":
                    said = torch.full((2, 1), int(name == "attention_mask"))
                    first = torch.cat([first, said], -1)
                whole[name] = torch.cat([first, new[name].expand(2, -1)], -1)
            # Row by row: the first prompt shows one video, the second an image and two videos.
            patches = [int(n) for n in inputs["video_grid_thw"].prod(-1)]
            old = inputs["pixel_values_videos"].split(patches)
            fresh = new["pixel_values_videos"]
            whole["pixel_values_videos"] = torch.cat([old[0], fresh, *old[1:], fresh])
            grids, grid = inputs["video_grid_thw"], new["video_grid_thw"]
            whole["video_grid_thw"] = torch.cat([grids[:1], grid, grids[1:], grid])
            seen.clear()
            model.generate(**whole, **as_argument(cache_of(out)), max_new_tokens=1)
    finally:
        handle.remove()
    begun = compress(model, inputs, **options)["attention_mask"].sum(-1)
    for row, positions in enumerate(seen[0][1]):
        # From the last token of the answer on, one by one; padding of the turn has the last one.
        assert int(positions.max()) - int(begun[row]) + 1 == len(positions.unique())


def test_a_block_may_be_left_while_generate_still_runs():
    model, inputs = build(), one_video()
    with torch.no_grad():
        plain = model(**inputs).logits
    released, left = threading.Event(), threading.Event()

    class Slow(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            released.set()
            left.wait(10)
            return torch.ones(len(ids), dtype=torch.bool)

    with attach(model):
        thread = threading.Thread(
            target=model.generate,
            kwargs={**inputs, "stopping_criteria": [Slow()], "max_new_tokens": 4},
        )
        thread.start()
        released.wait(10)
    left.set()
    thread.join()
    assert "forward" not in vars(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


def test_the_models_own_defaults_of_generation_do_not_reach_an_encoded_prompt():
    model, inputs = build(), one_video()
    question = tokens(TURNS[0])
    with attach(model) as session:
        expected = session.ask(session.prefill(inputs), question, max_new_tokens=4)
    for defaults in (
        {"num_beams": 3},
        {"use_cache": False},
        {"num_return_sequences": 2, "num_beams": 2},
    ):
        model = build()
        model.generation_config.update(**defaults)
        with attach(model) as session:
            found = session.ask(session.prefill(inputs), question, max_new_tokens=4)
        assert torch.equal(found, expected), defaults
    model.generation_config.cache_implementation = "static"
    with attach(model) as session, pytest.raises(PromptError, match="cannot grow with questions"):
        session.prefill(inputs)


def test_what_cannot_be_asked_is_refused(model):
    with attach(model) as session:
        first = session.prefill(one_video())
        for question, options, said in (
            (tokens(TURNS[0])[0], {}, "a question of one token or more"),
            (tokens(TURNS[0])[:, :0], {}, "a question of one token or more"),
            (tokens(TURNS[0]), {"num_beams": 2}, "ask the same question in several rows"),
            (tokens(TURNS[0]), {"num_return_sequences": 2}, "in several rows"),
        ):
            with pytest.raises(PromptError, match=said):
                session.ask(first, question, **options)
        with pytest.raises(PromptError, match="no input_ids"):
            session.prefill({"inputs": one_video()["input_ids"]})
        two = session.prefill(batch(rows=(0, 1)))
        with pytest.raises(PromptError, match="one or several questions for each prompt"):
            session.ask(two, tokens(TURNS[0], 3))
    other = build()
    with attach(other) as session, pytest.raises(PromptError, match="by another model"):
        session.ask(first, tokens(TURNS[0]))


def test_a_new_video_after_several_answers_to_one_prompt_equals_the_masked_run(model):
    inputs = one_video()
    with attach(model):
        out = first_turn(model, num_beams=2, num_return_sequences=2)
        whole = {k: v.repeat(*[2] + [1] * (v.ndim - 1)) for k, v in two_videos().items()}
        whole["input_ids"] = torch.cat([out.sequences, whole["input_ids"]], -1)
        for name in ("attention_mask", "mm_token_type_ids"):
            before = torch.ones_like(out.sequences)
            before[:, : length(inputs)] = inputs[name]
            before[:, length(inputs) :] = name == "attention_mask"
            whole[name] = torch.cat([before, whole[name]], -1)
        for name in ("pixel_values_videos", "video_grid_thw"):
            first, rest = inputs[name], two_videos()[name]
            whole[name] = torch.cat([first, rest, first, rest])
        later = model.generate(**whole, **as_argument(cache_of(out)), max_new_tokens=4)
    for row in range(2):
        alone = {k: v[row::2] for k, v in whole.items() if v.shape[:1] == (2,)}
        for name in ("pixel_values_videos", "video_grid_thw"):
            alone[name] = torch.cat([inputs[name], two_videos()[name]])
        oracle = Oracle(model, alone, compress(model, alone).plans)
        assert oracle.says(later[row : row + 1, whole["input_ids"].shape[1] :])


def test_a_cache_of_somebody_else_with_a_video_is_refused(model):
    inputs = one_video()
    out = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    with attach(model):
        for call in (model.generate, model):
            with pytest.raises(PromptError, match="holds a prompt already"):
                call(**inputs, **as_argument(cache_of(out)))


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids[:, 1:],
        lambda ids: ids.index_fill(1, torch.tensor([3]), 5),
        lambda ids: ids.index_fill(1, torch.tensor([ids.shape[1] - 3]), 5),
        lambda ids: ids[:, :-2],
        lambda ids: ids.repeat(2, 1),
    ],
    ids=["a token less", "another prompt", "another answer", "shorter", "more rows"],
)
def test_ids_that_do_not_begin_with_the_cached_tokens_are_refused(model, change):
    with attach(model):
        out = first_turn(model)
        ids = change(out.sequences)
        with pytest.raises(PromptError, match="do not begin with the"):
            model.generate(input_ids=ids, **as_argument(cache_of(out)), max_new_tokens=2)


def test_a_cropped_cache_is_refused_where_it_cuts_the_prompt(model):
    with attach(model):
        out = first_turn(model)
        ids = torch.cat([out.sequences, tokens(TURNS[0])], -1)
        cropped = copy.deepcopy(cache_of(out))
        cropped.crop(-2)
        later = model.generate(input_ids=ids, **as_argument(cropped), max_new_tokens=4)
        oracle = Oracle(model, one_video(), compress(model, one_video()).plans)
        oracle.append(ids[:, length(one_video()) :])
        assert oracle.says(later[:, ids.shape[1] :])
        cache_of(out).crop(-20)
        with pytest.raises(PromptError, match="do not begin with the"):
            model.generate(input_ids=ids, **as_argument(cache_of(out)))


def test_a_mask_of_another_width_is_refused(model):
    with attach(model):
        out = first_turn(model)
        ids = torch.cat([out.sequences, tokens(TURNS[0])], -1)
        with pytest.raises(PromptError, match="attention_mask has shape"):
            model.generate(
                input_ids=ids,
                **as_argument(cache_of(out)),
                attention_mask=torch.ones_like(ids)[:, 1:],
            )


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds", "mm_encoder_outputs"])
def test_what_counts_by_the_uncompressed_prompt_is_refused_later(model, name):
    with attach(model):
        out = first_turn(model)
        ids = torch.cat([out.sequences, tokens(TURNS[0])], -1)
        with pytest.raises(PromptError, match=f"brings {name}"):
            model.generate(input_ids=ids, **as_argument(cache_of(out)), **{name: torch.ones(1, 2)})


def test_new_ids_that_do_not_fit_the_cache_are_refused_by_forward(model):
    with attach(model):
        out = first_turn(model)
        for ids in (None, torch.ones(2, 1, dtype=torch.long)):
            with pytest.raises(PromptError, match="do not go on from the"):
                model(input_ids=ids, **as_argument(cache_of(out)))
        with pytest.raises(PromptError, match="do not begin with the"):
            model.generate(**as_argument(cache_of(out)))


def test_the_wrapped_methods_keep_their_signatures(model):
    before = [inspect.signature(getattr(model, name)) for name in ("generate", "forward")]
    with attach(model):
        inside = [inspect.signature(getattr(model, name)) for name in ("generate", "forward")]
    assert inside == before
