"""Towers that read some of their patches: what is left is what a mask would have left."""

import sys

import pytest
import torch

import tokenfuse
from families import FAMILIES
from tokenfuse import FusionPlan, Strategy, TowerStrategy
from tokenfuse.compression import prompt_adapter
from tokenfuse.errors import ConfigError, PlanError, UnsupportedModelError
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.registry import default_registry
from tokenfuse.sessions._decoder import decoder_layers

pytestmark = pytest.mark.usefixtures("one_thread")

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"]
PROMPT = [
    [("text", 1), ("video", 1), ("text", 2)],
    [("text", 4), ("video", 2), ("text", 3), ("image", 2), ("text", 2)],
]
every = pytest.mark.parametrize("name", QWEN)


class Before(TowerStrategy):
    """Keeps a share of each item, drawn by lot; of the first frame one token at most."""

    name = "before"
    share: float = 0.5

    def tower_plan(self, pixels):
        n, (_, h, w) = pixels.num_tokens, pixels.grid
        lots = torch.rand(n, generator=torch.Generator().manual_seed(n))
        if self.share < 1 and pixels.grid[0] > 1:
            lots[1 : h * w] -= 1
        count = max(1, round(n * self.share))
        return FusionPlan.from_survivors(lots.topk(count).indices.sort().values, n)


def model_and_inputs(name, attention="sdpa"):
    family = FAMILIES[name]
    return family.build(attention), family.prompt(PROMPT, "left")


def masked(model, inputs, modality, keep):
    """The full tower's output, in which no patch sees those that are not kept."""
    visual = model.base_model.visual
    module = sys.modules[type(visual).__module__]
    group, order = visual.spatial_merge_size**2, None
    if hasattr(visual, "fullatt_block_indexes"):
        order = module.get_vision_window_index(
            inputs[f"{modality}_grid_thw"],
            visual.spatial_merge_size,
            visual.window_size,
            visual.patch_size,
        )[0]
    seen = (keep if order is None else keep[order]).repeat_interleave(group)

    def attend(attention, args, kwargs, _):
        states = args[0] if args else kwargs["hidden_states"]
        q, k, v = attention.qkv(states).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        q, k = module.apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
        lengths = kwargs["cu_seqlens"].diff()
        segment = torch.arange(len(lengths)).repeat_interleave(lengths.long())
        visible = (segment[:, None] == segment) & (seen | torch.eye(len(seen), dtype=torch.bool))
        logits = torch.einsum("qhd,khd->hqk", q, k) * attention.scaling
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        return attention.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))

    handles = [
        block.attn.register_forward_hook(attend, with_kwargs=True) for block in visual.blocks
    ]
    adapter = prompt_adapter(model, default_registry())
    try:
        return adapter._encode(inputs, modality)
    finally:
        for handle in handles:
            handle.remove()


@every
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_what_is_left_is_what_a_mask_leaves(name, attention):
    model, inputs = model_and_inputs(name, attention)
    adapter, strategy = prompt_adapter(model, default_registry()), Before()
    short = tokenfuse.compress(model, inputs, strategy)
    for modality in ("image", "video"):
        plans = [strategy.tower_plan(pixels) for pixels in adapter.pixels(inputs, modality)]
        keep = torch.cat([plan.keep_mask for plan in plans])
        assert not bool(keep.all())
        whole = masked(model, inputs, modality, keep)
        mine = short["mm_encoder_outputs"][modality]
        pairs = [(mine.pooler_output, whole.pooler_output)]
        if getattr(mine, "deepstack_features", None) is not None:
            pairs += zip(mine.deepstack_features, whole.deepstack_features, strict=True)
        for few, many in pairs:
            few, many = (
                x if isinstance(x, torch.Tensor) else torch.cat(list(x)) for x in (few, many)
            )
            torch.testing.assert_close(few.flatten(0, -2), many[keep], atol=1e-5, rtol=1e-4)
        found = [plan.survivors.tolist() for plan in short.plans[modality]]
        assert found == [plan.survivors.tolist() for plan in plans]


@every
@torch.no_grad()
def test_a_plan_that_keeps_all_changes_nothing(name):
    model, inputs = model_and_inputs(name)
    whole = model(**tokenfuse.compress(model, inputs, "uniform", keep_ratio=1.0)).logits
    mine = model(**tokenfuse.compress(model, inputs, Before(share=1.0))).logits
    assert torch.equal(mine, whole)
    assert torch.equal(
        model(**tokenfuse.compress(model, inputs, "pixelprune", theta=-1)).logits, whole
    )


@every
def test_the_tower_is_given_back(name):
    model, inputs = model_and_inputs(name)
    visual = model.base_model.visual

    def stop(*_):
        raise KeyboardInterrupt

    handle = visual.blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tokenfuse.compress(model, inputs, Before())
    handle.remove()
    assert not any(x._forward_pre_hooks or x._forward_hooks for x in visual.modules())


@every
def test_positions_and_turns_are_those_of_a_plan_behind_the_tower(name):
    """What differs is only what survivors have seen: prompt, positions and places are the same."""
    model, inputs = model_and_inputs(name)

    class Behind(Strategy):
        name = "behind"

        def plan(self, tokens):
            pixels = type("Fake", (), {"num_tokens": tokens.num_tokens, "grid": tokens.grid})
            return Before().tower_plan(pixels)

    one, two = (tokenfuse.compress(model, inputs, s) for s in (Before(), Behind()))
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(one[key], two[key])
    behind = {"tower_tokens": None, "tower_flops_before": 0, "tower_flops_after": 0}
    assert [item.model_copy(update=behind) for item in one.report.items] == two.report.items
    never = [model.config.image_token_id, model.config.video_token_id]
    with tokenfuse.attach(model, Before()) as session:
        prompt = session.prefill(inputs)
        question = torch.full((2, 3), 7)
        out = session.ask(prompt, question, max_new_tokens=3, suppress_tokens=never)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 6)


def test_chains_go_on_behind_the_tower_and_inside_the_llm():
    model, inputs = model_and_inputs("qwen3_vl")
    uniform = {"strategy": "uniform", "keep_ratio": 0.5}
    chain = tokenfuse.get_strategy(
        {"compose": [Before(share=0.5), uniform, {"strategy": "fastv", "layer": 1}]}
    )
    with tokenfuse.attach(model, chain) as session:
        model.generate(**inputs, max_new_tokens=2)
    report = session.report
    assert report.tokens_before > 3 * report.tokens_after
    assert sum(report.layer_tokens[1]) < sum(report.layer_tokens[0]) == report.tokens_after
    assert all(not layer._forward_pre_hooks for layer in decoder_layers(model))
    with pytest.raises(
        ConfigError, match="acts before the vision tower, so it can only come first"
    ):
        tokenfuse.get_strategy({"compose": ["uniform", "pixelprune"]})
    with pytest.raises(ConfigError, match="evs needs every place of the grid"):
        tokenfuse.get_strategy({"compose": ["pixelprune", "evs"]})
    with pytest.raises(ConfigError, match="acts before or inside the vision tower; put it"):
        tokenfuse.get_strategy({"video": "pixelprune"})


def test_other_towers_refuse_by_name():
    for name in ("llava", "glm4v"):
        with pytest.raises(UnsupportedModelError, match="pixelprune acts before or inside the v"):
            tokenfuse.attach(FAMILIES[name].build("sdpa"), "pixelprune")
    model, inputs = model_and_inputs("qwen3_vl")
    with pytest.raises(ConfigError, match="frames_as_images=False"):
        tokenfuse.compress(model, inputs, "pixelprune", frames_as_images=True)
    tokens = tokenfuse.VisualTokens.from_grid(torch.randn(4, 2), (1, 2, 2))
    with pytest.raises(ConfigError, match="bare tokens have none"):
        tokenfuse.get_strategy("pixelprune").compress(tokens)


def test_a_plan_that_fuses_pixels_is_refused():
    class Fuses(Before):
        def tower_plan(self, pixels):
            n = pixels.num_tokens
            return FusionPlan.from_roots(torch.tensor([0]), torch.zeros(n, dtype=torch.long))

    model, inputs = model_and_inputs("qwen3_vl")
    with pytest.raises(PlanError, match="fuses before the vision tower"):
        tokenfuse.compress(model, inputs, Fuses())


def test_a_still_video_costs_the_tower_one_frame():
    model, inputs = model_and_inputs("qwen3_vl")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    pixels = inputs["pixel_values_videos"].clone()
    pixels[: t * h * w] = pixels[: h * w].repeat(t, 1)
    seen = []
    block = model.base_model.visual.blocks[0]
    handle = block.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    short = tokenfuse.compress(model, inputs | {"pixel_values_videos": pixels}, "pixelprune")
    handle.remove()
    assert short.report.items[1].frame_tokens_after == [h * w // 4] + [0] * (t - 1)
    rest = int(inputs["video_grid_thw"][1:].prod(-1).sum())
    assert h * w + rest in seen


def test_gradients_reach_the_tower_through_a_cut():
    model, inputs = model_and_inputs("qwen3_vl")
    model.train()
    short = tokenfuse.compress(model, inputs, Before())
    model(**short, labels=short["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.base_model.visual.blocks[0].parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert any(float(g.abs().max()) > 0 for g in gradients)


def test_later_turns_cut_what_they_bring():
    model, _ = model_and_inputs("qwen3_vl")
    family, never = FAMILIES["qwen3_vl"], [model.config.image_token_id, model.config.video_token_id]
    begun = family.prompt([PROMPT[0]], "left")
    options = {"max_new_tokens": 3, "suppress_tokens": never, "return_dict_in_generate": True}
    with tokenfuse.attach(model, Before()) as session:
        first = model.generate(**begun, **options)
        more = family.prompt([[*PROMPT[0], ("video", 2), ("text", 3)]], "left")
        new = more["input_ids"].shape[1] - begun["input_ids"].shape[1]
        ids = torch.cat([first.sequences, more["input_ids"][:, -new:]], -1)
        types = [begun["mm_token_type_ids"], torch.zeros_like(first.sequences[:, -3:])]
        later = {
            **more,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.cat([*types, more["mm_token_type_ids"][:, -new:]], -1),
        }
        model.generate(**later, **options, **as_argument(cache_of(first)))
    report = session.report
    assert len(report.items) == 2
    blocks = len(model.base_model.visual.blocks)
    for item in report.items:
        assert item.tower_tokens == [item.tokens_after] * blocks
        assert item.tokens_after < item.tokens_before
    assert f"vision tower  blocks 0-{blocks - 1}: {report.tokens_after} tokens" in str(report)
    assert 0 < report.tower_flops_after < report.tower_flops_before


def test_the_chain_of_all_three_stages():
    """What is left of still places is matched, and cut again inside the LLM."""
    model, inputs = model_and_inputs("qwen3_vl")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    pixels = inputs["pixel_values_videos"].clone()
    # The left half of every frame is that of the first.
    frames = pixels[: t * h * w].view(t, -1, pixels.shape[-1])
    frames[:, : h * w // 2] = frames[:1, : h * w // 2]
    steps = [
        {"strategy": "pixelprune", "theta": 0.02},
        {"strategy": "ttf", "threshold": 0.1},
        {"strategy": "fastv", "layer": 1, "keep_ratio": 0.3},
    ]
    with tokenfuse.attach(model, {"compose": steps}) as session:
        model.generate(**inputs | {"pixel_values_videos": pixels}, max_new_tokens=2)
    report = session.report
    items = [item for item in report.items if item.modality == "video"]
    assert items[0].tower_tokens[0] < items[0].tokens_before
    assert sum(i.tokens_after for i in items) <= sum(i.tower_tokens[-1] for i in items)
    assert sum(report.layer_tokens[1]) < sum(report.layer_tokens[0]) == report.tokens_after


def test_a_cursor_costs_a_little_and_a_hard_cut_a_whole_frame():
    model, inputs = model_and_inputs("qwen3_vl")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    whole = inputs["pixel_values_videos"]
    places = h * w // 4

    def kept(change):
        pixels = whole.clone()
        frames = pixels[: t * h * w].view(t, places, 4, -1)
        frames[:] = frames[:1].clone()
        change(frames)
        given = inputs | {"pixel_values_videos": pixels}
        return tokenfuse.compress(model, given, "pixelprune").report.items[1].frame_tokens_after

    def cursor(frames):
        for frame in range(t):
            frames[frame, frame % places] = 0.25

    def cut(frames):
        frames[t - 1] = -frames[0] - 0.5

    # Where the cursor is, and where it was.
    found = kept(cursor)
    assert found[0] == places
    assert all(1 <= count <= 2 for count in found[1:])
    assert kept(cut) == [places] + [0] * (t - 2) + [places]
