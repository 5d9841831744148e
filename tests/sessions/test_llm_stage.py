"""Cuts inside the LLM, beyond what the conformance kit holds for every family."""

import copy
import functools
import threading
import types

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

import tokenfuse
from families import FAMILIES
from models import (
    AMONG,
    ROUNDING,
    batch,
    build,
    frames,
    one_image,
    one_video,
    prompt,
    two_videos,
    user,
    visual_ids,
)
from tokenfuse import FusionPlan, hookimpl
from tokenfuse.errors import ConfigError, PlanError, PromptError, UnsupportedModelError
from tokenfuse.ops.row_attention import received_attention, row_attention
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.prompt.layers import Kept, pad_left
from tokenfuse.registry import Registry
from tokenfuse.sessions._decoder import decoder_layers
from tokenfuse.sessions._masks import Entries, cut_mask
from tokenfuse.sessions.proportional import before_attention
from tokenfuse.strategies._inside import LayerStrategy
from tokenfuse.strategies._layers import LayerCut, WeighedPlan, fuse_weighed
from tokenfuse.strategies.compose import Compose
from tokenfuse.testing._inside import CutInside, Watched, gone_inside
from tokenfuse.testing.oracle import MaskedRun

pytestmark = pytest.mark.usefixtures("one_thread")

# DeepStack is added after its first two layers.
deep = functools.cache(lambda attention="sdpa": build(attention=attention, layers=5))
NEVER = list(visual_ids().values())
GREEDY = {
    "max_new_tokens": 8,
    "suppress_tokens": NEVER,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def oracle_of(model, inputs, cache):
    """The full-length run that hides from each layer what its cache does not hold."""
    real = inputs["attention_mask"].bool()
    gone = gone_inside(cache._tokenfuse_turn, real)
    return MaskedRun(model, inputs, torch.zeros_like(real), never=NEVER, later=gone)


def agree(out, inputs, oracle):
    begins = inputs["input_ids"]
    tokens = out.sequences[:, begins.shape[1] :]
    expected = oracle.follow(tokens)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=ROUNDING, rtol=0)
    assert float(oracle.lag(tokens, expected).max()) <= 2 * ROUNDING


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [(1,), (2,), (3,), (4,), (1, 2), (1, 3, 4)])
@pytest.mark.parametrize("shown", [two_videos, batch, lambda: batch("right")])
def test_cuts_before_between_and_after_deepstack(attention, layers, shown):
    model, inputs = deep(attention), shown()
    with tokenfuse.attach(model, CutInside(layers=layers)) as session, torch.no_grad():
        output = model(**inputs, use_cache=True)
    oracle = oracle_of(model, inputs, cache_of(output))
    left = inputs["attention_mask"].bool()
    for gone in oracle.later.values():
        left = left & ~gone
    torch.testing.assert_close(output.logits[left], oracle.logits()[left], atol=ROUNDING, rtol=0)
    read = [sum(layer) for layer in session.report.layer_tokens]
    assert [i for i in range(1, 5) if read[i] < read[i - 1]] == list(layers)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_static_caches_and_samples(kind, options):
    model, inputs = deep(), batch()
    with tokenfuse.attach(model, CutInside(layers=(1, 3))):
        first = model.generate(**inputs, **GREEDY)
        out = model.generate(**inputs, **GREEDY, **options, cache_implementation=kind)
    times = len(out.sequences) // len(first.sequences)
    for which in range(times):
        part = copy.copy(out)
        part.sequences = out.sequences[which::times]
        tokens = part.sequences[:, inputs["input_ids"].shape[1] :]
        oracle = oracle_of(model, inputs, cache_of(first))
        mine = torch.stack(out.logits, 1)[which::times]
        torch.testing.assert_close(mine, oracle.follow(tokens), atol=ROUNDING, rtol=0)


def test_a_second_turn_on_a_static_cache():
    model, inputs = deep(), one_video()
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 40)
    with tokenfuse.attach(model, CutInside(layers=(1, 3))):
        first = model.generate(**inputs, **GREEDY, **as_argument(cache))
        held = [int(cache.get_seq_length(layer)) for layer in range(5)]
        assert held[0] > held[1] == held[2] > held[3] == held[4]
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], -1)
        mask = torch.ones_like(ids)
        second = model.generate(
            input_ids=ids, attention_mask=mask, **GREEDY, **as_argument(cache_of(first))
        )
    oracle = oracle_of(model, inputs, cache_of(first))
    oracle.append(ids[:, length:])
    agree(second, {"input_ids": ids}, oracle)


def test_without_a_cache_every_token_cuts_anew():
    model, inputs = build(), one_video()
    seen = []
    with tokenfuse.attach(model, Watched(layers=(1,), seen=seen.append)):
        out = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}, use_cache=False)
    assert [len(tokens.states) - len(seen[0].states) for tokens in seen] == [0, 1, 2]
    # The answer so far is what scores.
    whole = torch.cat([inputs["input_ids"], out.sequences[:, -3:-1]], -1)
    kept = [set(tokens.attention[:, 0].mean(0).topk(4).indices.tolist()) for tokens in seen]
    assert len(kept) == 3
    assert whole.shape[1] == seen[-1].states.shape[0]


def test_lookup_decoding_changes_nothing():
    model, inputs = deep(), one_video()
    with tokenfuse.attach(model, CutInside(layers=(2,))):
        expected = model.generate(**inputs, **GREEDY)
        out = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3)
    oracle = oracle_of(model, inputs, cache_of(expected))
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
    logits = oracle.follow(tokens)
    assert float(oracle.lag(tokens, logits).max()) <= 2 * ROUNDING


def test_a_prompt_in_parts_is_refused_by_name():
    model, inputs = deep(), one_video()
    with (
        tokenfuse.attach(model, CutInside(layers=(2,))),
        pytest.raises(PromptError, match="prefill_chunk_size"),
    ):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=16, **as_argument(DynamicCache()))


def test_a_model_called_token_by_token():
    model, inputs = deep(), one_video()
    with tokenfuse.attach(model, CutInside(layers=(1, 3))), torch.no_grad():
        output = model(**inputs, use_cache=True)
        oracle = oracle_of(model, inputs, cache_of(output))
        ids, logits = inputs["input_ids"], [output.logits[:, -1]]
        for token in (7, 8, 9):
            ids = torch.cat([ids, torch.tensor([[token]])], -1)
            output = model(
                input_ids=ids[:, -1:],
                attention_mask=torch.ones_like(ids),
                **as_argument(cache_of(output)),
            )
            logits.append(output.logits[:, -1])
    tokens = torch.tensor([[7, 8, 9]])
    expected = oracle.follow(tokens)
    torch.testing.assert_close(torch.stack(logits[:3], 1), expected, atol=ROUNDING, rtol=0)


class MergeInside(LayerStrategy):
    """Merges each odd visual token into the one before."""

    name = "merge_inside"
    layers: tuple[int, ...]

    def cuts(self):
        return tuple(LayerCut(layer, self.pairs, fuse=fuse_weighed) for layer in self.layers)

    def pairs(self, tokens):
        index = torch.arange(tokens.num_visual)
        plan = FusionPlan.from_roots(index[::2], index // 2 * 2)
        return WeighedPlan(plan.survivors, plan.target, tokens.sizes.float())


class DropInside(MergeInside):
    """Drops each odd visual token."""

    name = "drop_inside"

    def cuts(self):
        return tuple(LayerCut(layer, self.even) for layer in self.layers)

    def even(self, tokens):
        n = tokens.num_visual
        return FusionPlan.from_survivors(torch.arange(0, n, 2), n)


def merged_by_hand(model, inputs, layers, drops=()):
    """The logits of the last token, layer by layer, with merging and DeepStack written out."""
    decoder, caught = model.get_decoder(), {}

    def catch(_, args, kwargs):
        caught.update(kwargs)

    handle = decoder.register_forward_pre_hook(catch, with_kwargs=True)
    model(**inputs)
    handle.remove()
    states, positions = caught["inputs_embeds"], caught["position_ids"][-3:]
    visual = caught["visual_pos_masks"][0].nonzero().flatten()
    place = torch.arange(states.shape[1])
    weight = torch.ones(len(visual))
    extra = [x.clone() for x in caught["deepstack_visual_embeds"]]

    def pairs(x, weight, number):
        if number in drops:
            return x[::2]
        out = []
        for i in range(0, len(x), 2):
            w = weight[i : i + 2]
            out.append((x[i : i + 2] * w[:, None]).sum(0) / w.sum())
        return torch.stack(out)

    for number, layer in enumerate(decoder.layers):
        if number in (*layers, *drops):
            fused = pairs(states[0, visual], weight, number)
            extra = [pairs(x, weight, number) for x in extra]
            sums = torch.stack([weight[i : i + 2].sum() for i in range(0, len(weight), 2)])
            weight = weight[::2] if number in drops else sums
            states = states.clone()
            states[0, visual[::2]] = fused
            gone = set(visual[1::2].tolist())
            left = torch.tensor([i for i in range(states.shape[1]) if i not in gone])
            states, place = states[:, left], place[left]
            marks = torch.zeros(int(left.max()) + 1)
            marks[visual] = 1
            visual = marks[left].nonzero().flatten()
        rope = decoder.rotary_emb(states, positions[..., place])
        n = states.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        states = layer(states, position_embeddings=rope, attention_mask=causal)
        if number < len(extra):
            states = states.clone()
            states[0, visual] = states[0, visual] + extra[number]
    return model.lm_head(decoder.norm(states))[:, -1]


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2), (1, 3)])
@pytest.mark.parametrize("shown", [one_video, two_videos, one_image])
def test_merged_tokens_get_the_mean_of_their_deepstack_features(layers, shown):
    model, inputs = deep(), shown()
    with torch.no_grad():
        expected = merged_by_hand(model, inputs, layers)
        with tokenfuse.attach(model, MergeInside(layers=layers)):
            mine = model(**inputs).logits[:, -1]
        plain = model(**inputs).logits[:, -1]
    torch.testing.assert_close(mine, expected, atol=ROUNDING, rtol=0)
    assert float((mine - plain).abs().max()) > 10 * ROUNDING


@pytest.mark.parametrize(("layers", "drops"), [((1,), (2,)), ((2,), (1,)), ((1, 3), (2,))])
def test_merging_and_dropping_among_deepstack_layers(layers, drops):
    model, inputs = build(layers=5, deepstack=(0, 1, 2)), two_videos()
    steps = [
        MergeInside(layers=(n,)) if n in layers else DropInside(layers=(n,))
        for n in sorted((*layers, *drops))
    ]
    with torch.no_grad():
        expected = merged_by_hand(model, inputs, layers, drops)
        with tokenfuse.attach(model, Compose(compose=tuple(steps))):
            mine = model(**inputs).logits[:, -1]
    torch.testing.assert_close(mine, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("shown", [one_video, lambda: batch()])
def test_an_answer_reads_the_cache_in_part(shown):
    """DyCoke's second stage equals the full run in which each step hides its own tokens."""
    model, inputs, layer = deep(), shown(), 2
    strategy = tokenfuse.get_strategy(
        "dycoke", keep_ratio=1.0, cache_layer=layer, cache_keep_ratio=0.25
    )
    steps = []

    class Noting(type(strategy)):
        def _read(self, scores, state):
            steps.append(super()._read(scores, state))
            return steps[-1]

    with tokenfuse.attach(model, Noting(**dict(strategy))) as session:
        out = model.generate(**inputs, **GREEDY)
    assert session.report.tokens_after == session.report.tokens_before
    rows, length = inputs["input_ids"].shape
    visual = torch.isin(inputs["input_ids"], torch.tensor(NEVER))
    tokens = out.sequences[:, length:]
    total = length + tokens.shape[1]
    blocked = torch.zeros(rows, 1, total, total, dtype=torch.bool)
    # The first token of an answer comes from the prompt, which is read whole.
    assert len(steps) == rows * (tokens.shape[1] - 1)
    for number, read in enumerate(steps):
        step, row = divmod(number, rows)
        assert int(read.sum()) == int(len(read) * 0.25 + 1e-9)
        blocked[row, 0, length + step, :length][visual[row]] = ~read

    def hide(module, args, kwargs):
        if module.layer_idx < layer:
            return None
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones(total, total, dtype=torch.bool).tril()[None, None]
        return args, kwargs | {"attention_mask": mask & ~blocked}

    oracle = MaskedRun(model, inputs, torch.zeros_like(visual))
    with before_attention(model, hide):
        expected = oracle.follow(tokens)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=ROUNDING, rtol=0)


def test_the_choice_stays_while_attention_is_alike():
    strategy = tokenfuse.get_strategy("dycoke", cache_layer=2, cache_keep_ratio=0.5)
    from tokenfuse.strategies._layers import StepState

    state, choose = StepState(), strategy.cache_pruning().choose
    first = choose(torch.tensor([1.0, 0.6, 0.5, 0.0]), state)
    assert first.tolist() == [True, True, False, False]
    # Alike, though the greatest are others.
    assert torch.equal(choose(torch.tensor([1.0, 0.5, 0.6, 0.0]), state), first)
    assert choose(torch.tensor([0.0, 0.0, 1.0, 0.9]), state).tolist() == [False, False, True, True]


REFUSED = {
    "beyond": ({"strategy": "fastv", "layer": 5}, "has 5 layers; expected 1 to 4"),
    "zero": ({"strategy": "fastv", "layer": 0}, "layer: 0 is wrong"),
    "negative": ({"strategy": "uniform", "layer": -1}, "layer: -1 is wrong"),
    "grows": (
        {"strategy": "pyramiddrop", "layers": [1, 2], "keep_ratio": [0.2, 0.5]},
        "grows from layer to layer",
    ),
    "falls": (
        {"strategy": "pyramiddrop", "layers": [3, 2], "keep_ratio": [0.5, 0.2]},
        r"do not rise; expected \[2, 3\]",
    ),
    "too few": (
        {"strategy": "pyramiddrop", "layers": [1, 2], "keep_ratio": [0.5]},
        "1 value.s. for 2 layer.s.",
    ),
    "order": (
        {"compose": [{"strategy": "fastv"}, "ttf"]},
        "fastv acts inside the LLM, and ttf behind it",
    ),
    "twice": (
        {"compose": [{"strategy": "fastv", "layer": 2}, {"strategy": "uniform", "layer": 2}]},
        "expected each layer once",
    ),
    "a chain's ratio": (
        {"compose": ["ttf", {"strategy": "fastv"}], "keep_ratio": 0.2},
        "expected the keep_ratio of each step",
    ),
    "proportional": ({"strategy": "fastv", "attention": "proportional"}, "attention: plain"),
    "by modality": ({"video": "fastv"}, "acts inside the LLM, on all visual tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_what_can(case):
    configuration, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        tokenfuse.attach(deep(), configuration)


def test_compress_and_bare_tensors_say_that_they_cannot():
    model = deep()
    with pytest.raises(ConfigError, match=r"fastv acts inside the LLM.*expected attach"):
        tokenfuse.compress(model, one_video(), "fastv")
    tokens = tokenfuse.VisualTokens.from_grid(torch.randn(8, 4), (2, 2, 2))
    for name, options in (("fastv", {}), ("uniform", {"layer": 3})):
        with pytest.raises(ConfigError, match="expected attach"):
            tokenfuse.get_strategy(name, **options).compress(tokens)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_decoders_of_other_layers_are_refused_by_name(family):
    with pytest.raises(UnsupportedModelError, match=r"sliding window|no attention"):
        tokenfuse.attach(FAMILIES[family].build("sdpa"), "fastv", layer=1)


class Wrong(LayerStrategy):
    name = "wrong"
    returns: str

    def cuts(self):
        return (LayerCut(1, self.plan_wrongly),)

    def plan_wrongly(self, tokens):
        if self.returns == "none":
            return None
        if self.returns == "long":
            return FusionPlan.identity(tokens.num_visual + 1)
        return FusionPlan.from_survivors(torch.tensor([], dtype=torch.long), tokens.num_visual)


@pytest.mark.parametrize("returns", ["none", "long", "empty"])
def test_a_wrong_plan_is_named_and_the_model_stays_usable(returns):
    model, inputs = deep(), one_video()
    with torch.no_grad():
        before = model(**inputs).logits
        with (
            pytest.raises(PlanError, match="strategy wrong"),
            tokenfuse.attach(model, Wrong(returns=returns)),
        ):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, before)
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))


def test_training_through_a_cut():
    model, inputs = build(layers=4), one_video()
    model.train()
    with tokenfuse.attach(model, "fastv", layer=1, keep_ratio=0.5):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.get_decoder().layers[2].parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.abs().max() > 0) for g in gradients)
    model.get_decoder().gradient_checkpointing = True
    with (
        tokenfuse.attach(model, "fastv", layer=1),
        pytest.raises(UnsupportedModelError, match="gradient checkpointing"),
    ):
        model(**inputs)


def test_observers_hear_of_a_prompt_once_and_of_what_the_layers_read():
    reports = []

    class Watching:
        @hookimpl
        def tokenfuse_compressed(self, report):
            reports.append(report)

    model, inputs = deep(), one_video()
    chain = {"compose": ["ttf", {"strategy": "fastv", "layer": 3, "keep_ratio": 0.3}]}
    with tokenfuse.attach(model, chain, registry=Registry([Watching()])) as session:
        model.generate(**inputs, **GREEDY)
    assert reports == [session.report]
    report = session.report
    assert report.tokens_before > report.tokens_after == report.layer_tokens[0][0]
    assert report.layer_tokens[2] == report.layer_tokens[0] > report.layer_tokens[3]
    assert report.layer_average < report.keep_ratio
    text = str(report)
    assert f"layers 0-2: {report.tokens_after}, 3-4: " in text
    assert "on average over layers" in text
    assert report.kv_cache_bytes_after < report.kv_cache_bytes_before
    # By hand: 5 layers, each with its own length.
    config = model.config.get_text_config()
    per = 2 * config.num_key_value_heads * config.head_dim * 4
    text_tokens = report.prompt_after[0] - report.tokens_after
    read = [layer[0] + text_tokens for layer in report.layer_tokens]
    assert report.kv_cache_bytes_after == per * sum(read)


def test_other_threads_are_left_alone():
    model, inputs = deep(), one_video()
    found = {}
    ready, go = threading.Event(), threading.Event()

    def wait(_):
        ready.set()
        assert go.wait(60)

    def cut():
        with torch.no_grad():
            found["cut"] = model(**inputs).logits

    with torch.no_grad(), tokenfuse.attach(model, Watched(layers=(2,), seen=wait)):
        thread = threading.Thread(target=cut)
        thread.start()
        assert ready.wait(60)
        # The decoder is free of the session; only the model's own methods are wrapped.
        states = torch.randn(1, 6, 48)
        mine = model.get_decoder()(inputs_embeds=states).last_hidden_state
        go.set()
        thread.join()
    with torch.no_grad():
        plain = model.get_decoder()(inputs_embeds=states).last_hidden_state
    assert torch.equal(mine, plain)
    assert found["cut"].shape[:2] == inputs["input_ids"].shape


def test_a_plugin_may_act_inside():
    class Plugin:
        @hookimpl
        def tokenfuse_register_strategies(self, register):
            register(MergeInside)

    model = deep()
    with tokenfuse.attach(model, "merge_inside", layers=(2,), registry=Registry([Plugin()])) as s:
        model.generate(**one_video(), **GREEDY)
    assert s.report.layer_tokens[2][0] == -(-s.report.layer_tokens[1][0] // 2)
    assert AMONG.strategies.keys() - {"drop", "halves"} <= tokenfuse.list_strategies().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_by_fp32_scores(dtype):
    model = build(layers=4).to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in one_video().items()}
    seen = []
    with tokenfuse.attach(model, Watched(layers=(2,), seen=seen.append)):
        out = model.generate(**inputs, **GREEDY)
    assert seen[0].attention.dtype == torch.float32
    assert all(bool(logits.isfinite().all()) for logits in out.logits)


def test_masks_of_flash_attention():
    """A mask of padding alone: entries that count stay, all others are hidden."""
    valid = torch.tensor([[False, True, True], [True, True, True]])
    kept = Kept(1, torch.tensor([[3, 0, 2], [0, 1, 3]]), valid, 4, False)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    entries = Entries.of(kept, 4, 1, 2, None, None, True, torch.device("cpu"))
    options = {"kind": "flash_attention_2", "dtype": torch.float32}
    found = cut_mask(mask, entries, 4, **options)
    assert found.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]
    assert cut_mask(None, entries, 4, **options).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    whole = Kept(1, kept.columns, torch.ones(2, 3, dtype=torch.bool), 4, True)
    entries = Entries.of(whole, 4, 1, 2, None, None, True, torch.device("cpu"))
    assert cut_mask(None, entries, 4, **options) is None


def test_rows_are_padded_on_the_left_with_columns_that_are_gone():
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    columns, valid = pad_left(keep, [3, 1])
    assert columns.tolist() == [[0, 2, 3], [3, 4, 2]]
    assert valid.tolist() == [[True, True, True], [False, False, True]]


def test_scores_of_few_rows_take_little_memory():
    """O(heads · L) for a row: at 8,192 tokens far from the map, and from a copy of the keys."""
    heads, groups, width, n = 32, 8, 128, 8192
    rng = torch.Generator().manual_seed(0)
    queries = torch.randn(heads, 1, width, generator=rng).bfloat16()
    keys = torch.randn(groups, n, width, generator=rng).bfloat16()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != (
                keys.untyped_storage().data_ptr()
            ):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        rows = row_attention(queries, keys, width**-0.5)
    assert largest <= 4 * heads * n + 1024
    whole = torch.einsum("gqd,gnd->gqn", queries.float().view(groups, 4, width), keys.float()).mul(
        width**-0.5
    )
    torch.testing.assert_close(rows[:, 0], whole.softmax(-1).view(heads, n), atol=1e-6, rtol=1e-4)


def test_what_all_rows_pay_together():
    rng = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 50, 8, generator=rng), torch.randn(2, 50, 8, generator=rng)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    every = row_attention(queries, keys, 0.3, causal, softcap=5.0)
    mine = received_attention(queries, keys, 0.3, lambda part: causal[part], softcap=5.0)
    torch.testing.assert_close(mine, every.mean((0, 1)))


def test_a_cache_goes_on_under_cuts_at_other_layers():
    model, inputs = deep(), one_video()
    length = inputs["input_ids"].shape[1]
    with tokenfuse.attach(model, CutInside(layers=(1, 3))):
        first = model.generate(**inputs, **GREEDY)
    ids = torch.cat([first.sequences, inputs["input_ids"]], -1)
    whole = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.cat(
            [
                inputs["mm_token_type_ids"],
                torch.zeros_like(first.sequences[:, length:]),
                inputs["mm_token_type_ids"],
            ],
            -1,
        ),
        "pixel_values_videos": torch.cat([inputs["pixel_values_videos"]] * 2),
        "video_grid_thw": torch.cat([inputs["video_grid_thw"]] * 2),
    }
    with tokenfuse.attach(model, CutInside(layers=(2,))) as session:
        second = model.generate(**whole, **GREEDY, **as_argument(cache_of(first)))
    turn = cache_of(second)._tokenfuse_turn
    assert [kept.layer for kept in turn.layers.kept] == [1, 2, 3]
    assert session.report.layer_tokens[1] > session.report.layer_tokens[2]
    agree(second, whole, oracle_of(model, whole, cache_of(second)))
    # And a turn of text under yet another strategy, which cuts nothing.
    later = torch.cat([second.sequences, torch.tensor([[7, 8]])], -1)
    with tokenfuse.attach(model, "ttf"):
        third = model.generate(
            input_ids=later,
            attention_mask=torch.ones_like(later),
            **GREEDY,
            **as_argument(cache_of(second)),
        )
    oracle = oracle_of(model, whole, cache_of(second))
    oracle.append(later[:, ids.shape[1] :])
    agree(third, {"input_ids": later}, oracle)


@pytest.mark.parametrize("name", ["sparsevlm", "fastv", "vitcop", "framefusion"])
def test_a_prompt_of_text_in_a_batch_stays_whole(name):
    model = deep()
    texts = [user("video", "What is it?"), user("How many objects are there, and of what shape?")]
    inputs = prompt(texts, videos=[frames(3, 3)])
    options = {"layers": 2, "keep_ratio": 0.4} if name in ("sparsevlm", "vitcop") else {}
    with tokenfuse.attach(model, name, **options) as session:
        out = model.generate(**inputs, **GREEDY)
        alone = model.generate(**prompt(texts[:1], videos=[frames(3, 3)]), **GREEDY)
    assert all(row[1] == 0 for row in session.reports[0].layer_tokens)
    near = [torch.stack(x.logits, 1)[0] for x in (out, alone)]
    torch.testing.assert_close(near[0][0], near[1][0], atol=ROUNDING, rtol=0)
    oracle = oracle_of(model, inputs, cache_of(out))
    if name != "framefusion" and not options.get("keep_ratio"):
        agree(out, inputs, oracle)


def test_a_prompt_that_ends_with_a_visual_token_is_refused():
    model, inputs = deep(), one_video()
    end = int((inputs["input_ids"][0] == NEVER[1]).nonzero().max()) + 1
    cut = {k: v[:, :end] if v.shape[:1] == (1,) and v.ndim == 2 else v for k, v in inputs.items()}
    cut["video_grid_thw"] = inputs["video_grid_thw"]
    with (
        pytest.raises(PromptError, match="ends with a visual token, which strategy fastv"),
        tokenfuse.attach(model, "fastv"),
        torch.no_grad(),
    ):
        model(**cut)


def test_the_report_of_a_later_turn_counts_what_the_caches_hold():
    model, inputs = deep(), one_video()
    one = {**GREEDY, "max_new_tokens": 1}
    with tokenfuse.attach(model, CutInside(layers=(1, 3))) as session:
        first = model.generate(**inputs, **one)
        ids = torch.cat([first.sequences, inputs["input_ids"]], -1)
        more = torch.zeros_like(first.sequences[:, inputs["input_ids"].shape[1] :])
        types = [inputs["mm_token_type_ids"], more, inputs["mm_token_type_ids"]]
        whole = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.cat(types, -1),
            "pixel_values_videos": torch.cat([inputs["pixel_values_videos"]] * 2),
            "video_grid_thw": torch.cat([inputs["video_grid_thw"]] * 2),
        }
        second = model.generate(**whole, **one, **as_argument(cache_of(first)))
    config, cache = model.config.get_text_config(), cache_of(second)
    per = 2 * config.num_key_value_heads * config.head_dim * 4
    held = [int(cache.get_seq_length(layer)) for layer in range(5)]
    report = session.report
    assert report.kv_cache_bytes_after == per * sum(held)
    assert report.layer_tokens[0] == [report.tokens_after] == [report.tokens_before]
    once = session.reports[0].layer_tokens
    assert report.layer_tokens == [[2 * n for n in layer] for layer in once]


def test_threads_share_an_attached_model():
    model = deep()
    prompts = [one_video(), two_videos(), one_image(), batch()]
    with tokenfuse.attach(model, {"compose": ["uniform", CutInside(layers=(1, 3))]}):
        expected = [model.generate(**inputs, **GREEDY).sequences for inputs in prompts]
        found = {}

        def answer(number):
            for _ in range(3):
                found[number] = model.generate(**prompts[number], **GREEDY).sequences

        threads = [threading.Thread(target=answer, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in range(len(prompts)))
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(model))


def test_beams_are_refused_where_steps_remember():
    model, inputs = deep(), one_video()
    with (
        tokenfuse.attach(model, "dycoke", cache_layer=2),
        pytest.raises(PromptError, match="num_beams is 2"),
    ):
        model.generate(**inputs, **GREEDY, num_beams=2)


class Reading(LayerStrategy):
    """Reads what it is told to at layer 2, perhaps after a cut at layer 1, and keeps all there."""

    name = "reading"
    queries: str | None = None
    own: bool = False
    cuts_before: bool = False
    seen: object = None

    def cuts(self):
        first = (LayerCut(1, self.halve),) if self.cuts_before else ()
        choose = (lambda tokens: tokens.text_after) if self.queries == "chosen" else None
        keys = self.queries is None
        return (*first, LayerCut(2, self.look, self.queries, self.own, choose, keys=keys))

    def halve(self, tokens):
        n = tokens.num_visual
        return FusionPlan.from_survivors(torch.arange(0, n, 2), n)

    def look(self, tokens):
        self.seen.append(tokens)
        return FusionPlan.identity(tokens.num_visual, tokens.visual.device)


@pytest.mark.parametrize("cuts_before", [False, True])
@pytest.mark.parametrize("queries", ["last", "chosen", "all", None])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "llava"])
@torch.no_grad()
def test_what_a_cut_reads_is_in_the_models_own_maps(family, queries, cuts_before):
    """Attention after softmax as the eager kernel returns it, and keys as the cache holds them."""
    model = FAMILIES[family].build("eager")
    kind = FAMILIES[family].modalities[0]
    rows = [[("text", 3), (kind, 2), ("text", 4)], [("text", 1), (kind, 1), ("text", 3)]]
    inputs = FAMILIES[family].prompt(rows, "left")
    for own in (False, True) if queries not in (None, "chosen") else (False,):
        seen = []
        strategy = Reading(queries=queries, own=own, cuts_before=cuts_before, seen=seen)
        with tokenfuse.attach(model, strategy):
            output = model(**inputs, output_attentions=True, use_cache=True)
        layer = 2 if own else 1
        for row, tokens in enumerate(seen):
            n = tokens.states.shape[0]
            every = output.attentions[layer][row, :, -n:, -n:]
            if queries is None:
                keys = cache_of(output).layers[layer].keys[row, :, -n:].transpose(0, 1)
                assert torch.equal(tokens.keys, keys)
            elif queries == "all":
                torch.testing.assert_close(
                    tokens.received, every.mean((0, 1)), atol=1e-5, rtol=1e-4
                )
            else:
                expected = tokens.text_after if queries == "chosen" else torch.tensor([n - 1])
                assert torch.equal(tokens.rows, expected)
                torch.testing.assert_close(
                    tokens.attention, every[:, expected], atol=1e-5, rtol=1e-4
                )


def test_autocast_rounds_no_choice():
    """Scores are those of the queries and keys that the model has made, in fp32."""
    model, inputs, kinds = deep(), one_video(), []

    class Looks(CutInside):
        name = "looks"

        def choose(self, tokens):
            product = tokens.features.float() @ tokens.features.float().T
            kinds.extend([tokens.attention.dtype, product.dtype])
            return super().choose(tokens)

    with tokenfuse.attach(model, Looks(layers=(2,))), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
        assert torch.is_autocast_enabled("cpu")
    assert kinds == [torch.float32, torch.float32]


def test_a_configuration_of_the_callers_is_neither_warned_of_nor_changed(recwarn):
    config = GenerationConfig(max_new_tokens=3, cache_implementation="static")
    before, model = copy.deepcopy(config.to_dict()), deep()
    with tokenfuse.attach(model, "fastv", layer=1):
        ids = model.generate(**one_video(), generation_config=config)
    assert ids.shape[1] == one_video()["input_ids"].shape[1] + 3
    assert config.to_dict() == before
    assert not [w for w in recwarn if "generation_config" in str(w.message)]


def test_v2_of_sparsevlm_is_refused_without_a_rotary_embedding():
    tokens = types.SimpleNamespace(attention=torch.rand(2, 1, 4), visual=torch.arange(3), rope=None)
    with pytest.raises(UnsupportedModelError, match="expected version: v1"):
        tokenfuse.get_strategy("sparsevlm", version="v2").corrected(tokens)
