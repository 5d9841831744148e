"""Positions and rows inside vLLM, played without it, against ``compress`` of the same prompt.

Two faults of vLLM's own pruning stand here as cases: the marker before a video's first frame, which
is not that frame's own, and positions above 256 in bfloat16.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenfuse
from families import END, FAMILIES, FIRST, HERE, IMAGE, MERGE, START, VIDEO, WORDS, number
from tokenfuse import get_strategy, hookimpl
from tokenfuse.integrations._vllm_models import Compressing
from tokenfuse.integrations._vllm_rows import block, stamped
from tokenfuse.registry import Registry
from tokenfuse.strategies.uniform import Uniform

WIDTH = 3


class Turned(Uniform):
    """Lets the last frame of a video stand first."""

    name: ClassVar[str] = "turned"

    def plan(self, tokens):
        order = torch.arange(tokens.grid[0]).roll(1)
        return replace(super().plan(tokens), frame_order=order if len(order) > 1 else None)


class Plugin:
    @hookimpl
    def tokenfuse_register_strategies(self, register):
        register(Turned)


AMONG = Registry([Plugin()], installed=False)
STRATEGIES = [get_strategy("uniform", keep_ratio=0.4), Turned(keep_ratio=0.6)]


class Upstream:
    """As much of a model of vLLM as ours asks for."""

    def __init__(self, *, vllm_config: Any, prefix: str) -> None:
        self.config = vllm_config.model_config.hf_config
        rate = vllm_config.model_config.multimodal_config.video_pruning_rate
        self.is_multimodal_pruning_enabled = bool(rate)

    def get_language_model(self):
        rows = torch.nn.functional.embedding
        weight = -torch.arange(200.0)[:, None].expand(-1, WIDTH)
        return SimpleNamespace(embed_input_ids=lambda ids: rows(ids, weight))


def stamps(t, count):
    return [i for f in range(t) for i in [HERE, *number(f), START, *[VIDEO] * count[f], END]]


class Stamped(Compressing, Upstream):
    times = "timestamps"

    def layout(self, grid, count):
        return stamps(grid[0], [count] + [0] * (grid[0] - 1))

    def video_item(self, grid, times):
        t, h, w = grid
        return stamped(torch.tensor(stamps(t, [h * w] * t)), grid, VIDEO, END)


class Block(Compressing, Upstream):
    times = "second_per_grid_ts"

    def layout(self, grid, count):
        return [VIDEO] * count

    def video_item(self, grid, times):
        return block(grid, VIDEO, float(times) * 2)


KINDS = {"qwen3_vl": Stamped, "qwen3_5": Stamped, "qwen2_5_vl": Block}


@functools.cache
def built(name):
    return FAMILIES[name].build("eager")


def engine(name, strategy):
    config = SimpleNamespace(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_config=SimpleNamespace(spatial_merge_size=MERGE),
    )
    if strategy is not None:
        config.tokenfuse = {"strategy": "uniform", "keep_ratio": 0.4}
    rates = SimpleNamespace(video_pruning_rate=None)
    whole = SimpleNamespace(hf_config=config, multimodal_config=rates)
    model = KINDS[name](vllm_config=SimpleNamespace(model_config=whole))
    assert model.is_multimodal_pruning_enabled == (strategy is not None)
    model.tokenfuse = strategy  # which no configuration may name
    return model


def ask(model, inputs, dtype):
    """The prompt as vLLM lays it out, its items, and what the encoder gives for each."""
    ids, at, prompt, features, embeds, places = inputs["input_ids"][0].tolist(), 0, [], [], [], []
    left = {
        IMAGE: [("image", size) for size in inputs.get("image_grid_thw", [])],
        VIDEO: [("video", size) for size in inputs.get("video_grid_thw", [])],
    }
    times = iter(inputs.get("second_per_grid_ts", [0.0] * 9))
    while at < len(ids):
        token = ids[at]
        if token not in (IMAGE, VIDEO) and not (token == HERE and isinstance(model, Stamped)):
            prompt.append(token)
            at += 1
            continue
        kind, size = left[VIDEO if token == HERE else token].pop(0)
        grid = model._merged(size)
        time = next(times) if kind == "video" else None
        whole = model._item(kind, grid, time)
        assert ids[at : at + len(whole.ids)] == whole.ids.tolist()
        # A row says which column of the prompt it comes from.
        visual = whole.ids == (VIDEO if kind == "video" else IMAGE)
        columns = torch.arange(at, at + len(whole.ids))[visual]
        rows = columns[:, None].expand(-1, WIDTH).to(dtype)
        inputs_of = {f"{kind}_grid_thw": [size], model.times: [time]}
        post = getattr(model, f"_postprocess_{kind}_embeds_evs")
        embeds.extend(post([rows], inputs_of))
        count = tokenfuse.integrations.vllm.num_kept(model.tokenfuse, kind, grid)
        laid = model.layout(grid, count) if kind == "video" else [IMAGE] * count
        # What the processor announces is what the encoder returns.
        assert len(laid) == len(embeds[-1])
        data = {f"{kind}_grid_thw": SimpleNamespace(data=size)}
        if kind == "video":
            data[model.times] = SimpleNamespace(data=time)
        place = SimpleNamespace(offset=len(prompt), length=len(laid))
        features.append(SimpleNamespace(modality=kind, data=data, mm_position=place))
        places.append((len(prompt), len(prompt) + len(laid)))
        prompt += laid
        at += len(whole.ids)
    return prompt, features, embeds, places


def read(model, prompt, features, embeds, places, ends, new):
    """Positions and rows of the prompt, read in parts that end at ``ends``, and the delta.

    ``new``: as the new runner of GPUs does it, which asks only where rows are read.
    """
    positions, delta = model.get_mrope_input_positions(prompt, features)
    first, found, rows = 0, [], []
    for end in [*ends, len(prompt)]:
        if end == first:
            continue
        parts = [
            rows_of[max(first - start, 0) : end - start]
            for rows_of, (start, stop) in zip(embeds, places, strict=True)
            if start < end and stop > first
        ]
        if parts or not new:
            ids = torch.tensor(prompt) if new else prompt
            read = model.recompute_mrope_positions(ids, list(parts), positions, first)
            parts, positions, delta = read
        found.append(positions[:, first:end])
        rows.extend(parts)
        first = end
    return torch.cat(found, dim=1), rows, delta


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda x: x.name)
@given(data=st.data())
def test_positions_and_rows_are_those_of_compress(name, strategy, data):
    model = built(name)
    # Times of Qwen2.5-VL that reach no further than a frame's side: behind others, transformers
    # goes on from the side and vLLM from the times.
    item = st.tuples(st.sampled_from(["image", "video"]), st.sampled_from([0, 3, 6]))
    words = st.tuples(st.just("text"), st.integers(0, 8))
    row = [data.draw(item), *data.draw(st.lists(st.one_of(item, words), max_size=4))]
    row = data.draw(st.permutations(row))
    long = data.draw(st.sampled_from([0, 300]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    inputs = FAMILIES[name].prompt([(*row, ("text", 1))])
    assert_equal(name, model, strategy, longer(inputs, long), dtype, data)


def longer(inputs, more):
    """With a long text in front."""
    text = torch.full((1, more), WORDS.start)
    ids = torch.cat([inputs["input_ids"][:, :1], text, inputs["input_ids"][:, 1:]], dim=1)
    types = torch.cat([text * 0, inputs["mm_token_type_ids"]], dim=1)
    return inputs | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
    }


def assert_equal(name, model, strategy, inputs, dtype, data):
    assert int(inputs["input_ids"][0, 0]) == FIRST
    options = {} if strategy.name == "uniform" else {"registry": AMONG}
    short = tokenfuse.compress(model, inputs, strategy, **options)
    mine = engine(name, strategy)
    prompt, features, embeds, places = ask(mine, inputs, dtype)
    assert len(prompt) == short["input_ids"].shape[1]
    ends = sorted(data.draw(st.lists(st.integers(0, len(prompt)), max_size=4)))
    new = data.draw(st.booleans())
    positions, rows, delta = read(mine, prompt, features, embeds, places, ends, new)
    expected = short["position_ids"][-3:, 0]
    assert torch.equal(positions, expected)
    assert delta == int(expected.max()) + 1 - len(prompt)
    assert all(part.shape[1] == WIDTH for part in rows)
    if dtype == torch.float32 and rows:
        # Visual rows say their column; text among them the negative of its id.
        ids, columns = inputs["input_ids"][0], short.columns[0]
        here = torch.cat([torch.arange(*place) for place in places])
        of = columns[here]
        visual = (ids[of] == IMAGE) | (ids[of] == VIDEO)
        wanted = torch.where(visual, of, -ids[of])
        assert torch.equal(torch.cat(rows)[:, 0].long(), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_without_a_configuration_asks_vllm(name):
    mine = engine(name, None)
    for call in (
        lambda: mine._postprocess_image_embeds_evs([], {}),
        lambda: mine._postprocess_video_embeds_evs([], {}),
        lambda: mine.get_mrope_input_positions([], []),
        lambda: mine.recompute_mrope_positions([], [], torch.zeros(3, 0), 0),
    ):
        with pytest.raises(AttributeError):
            call()
