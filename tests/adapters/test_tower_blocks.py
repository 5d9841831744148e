"""Cuts between the blocks of a vision tower: held against the tower run block by block, by hand."""

import itertools
import sys
import threading

import pytest
import torch
from pydantic import Field

import families
import tokenfuse
from families import FAMILIES
from tokenfuse import FusionPlan, Strategy, TowerStrategy
from tokenfuse.compression import prompt_adapter
from tokenfuse.errors import ConfigError, PlanError, UnsupportedModelError
from tokenfuse.prompt.cache import as_argument, cache_of
from tokenfuse.prompt.inputs import PIXELS
from tokenfuse.registry import default_registry
from tokenfuse.strategies._layers import WeighedPlan
from tokenfuse.strategies._tower import TowerCut, merged

pytestmark = pytest.mark.usefixtures("one_thread")

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"]
FRAMES = ["llava_onevision", "llava_next_video", "video_llava"]
PROMPT = [
    [("text", 1), ("video", 6), ("text", 2)],
    [("text", 4), ("video", 2), ("text", 3), ("image", 2), ("text", 2)],
]


class Recorded(TowerStrategy):
    """Does what another strategy does inside the tower, and notes its plans.

    ``noted``: for each call of the tower the plans by block; those for pixels are at -1.
    """

    name = "recorded"
    inner: Strategy
    noted: object = Field(None, exclude=True)

    def tower_plan(self, pixels):
        found = self.inner.tower_plan(pixels)
        self.noted[-1].setdefault(-1, []).append(found)
        return found

    @property
    def acts_before_tower(self):
        return self.inner.acts_before_tower

    @property
    def acts_in_tower(self):
        return self.inner.acts_in_tower

    def tower_cuts(self, blocks):
        own = {}
        self.noted.append(own)

        def noting(cut):
            def plan(tokens):
                found = cut.plan(tokens)
                own.setdefault(cut.block, []).append((found, tokens))
                return found

            return TowerCut(cut.block, plan, cut.frames, cut.keys, cut.proportional)

        return tuple(map(noting, self.inner.tower_cuts(blocks)))


class Pixels(TowerStrategy):
    """Drops some tokens of each item before the tower."""

    name = "pixels"

    def tower_plan(self, pixels):
        n = pixels.num_tokens
        kept = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.8
        kept[0] = True
        return FusionPlan.from_survivors(kept.nonzero().flatten(), n)


class Halves(TowerStrategy):
    """Merges the second half of the frames into the first one of each pair, whole."""

    name = "halves_frames"

    def tower_cuts(self, blocks):
        return (TowerCut(1, self.merge, frames=True), TowerCut(2, self.merge, frames=True))

    def merge(self, tokens):
        n = tokens.num_tokens
        if n == 1:
            return None
        roots = torch.arange(n)
        roots[1] = 0
        survivors = torch.tensor([0, *range(2, n)])
        plan = FusionPlan.from_roots(survivors, roots)
        return WeighedPlan(plan.survivors, plan.target, torch.arange(1.0, n + 1) * tokens.sizes)


CASES = {
    "uniform at 0": {"strategy": "uniform", "vision_block": 0},
    "uniform at 2": {"strategy": "uniform", "vision_block": 2, "keep_ratio": 0.3},
    "random at 1": {"strategy": "random", "vision_block": 1, "keep_ratio": 0.6},
    "tome": {"strategy": "tome", "tower": True},
    "tome, plain": {"strategy": "tome", "tower": True, "proportional": False, "r": 1},
    "earlytom": {"strategy": "earlytom", "threshold": -1.0, "blocks": [9, 18]},
    "frames": Halves(),
    "pixels, then two": {
        "compose": [
            Pixels(),
            {"strategy": "random", "vision_block": 1, "keep_ratio": 0.8},
            {"strategy": "uniform", "vision_block": 2},
        ]
    },
    "tome, then one": {
        "compose": [
            {"strategy": "tome", "tower": True, "r": [1, 0, 0]},
            {"strategy": "uniform", "vision_block": 2, "keep_ratio": 0.7},
        ]
    },
}


class Item:
    """The tokens of one item that are left: which, of what, and what they stand for."""

    def __init__(self, n, rows):
        self.members = [[i] for i in range(n)]
        self.rows = list(rows)

    def follow(self, plan):
        """The next step, token by token."""
        weights = getattr(plan, "weight", None)
        if weights is None:
            weights = torch.tensor([float(len(m)) for m in self.members])
        members, rows = [], []
        for slot in range(plan.num_kept):
            own = (plan.target == slot).nonzero().flatten().tolist()
            members.append([i for j in own for i in self.members[j]])
            total = sum(float(weights[j]) for j in own)
            rows.append(sum(self.rows[j] * (float(weights[j]) / total) for j in own))
        # A survivor has the place of the token that its plan names.
        first = [self.members[int(i)][0] for i in plan.survivors]
        members = [[f, *(x for x in m if x != f)] for f, m in zip(first, members, strict=True)]
        self.members, self.rows = members, rows


def of_frames(plan, place):
    """A plan for frames, for their tokens."""
    if plan is None:
        return None
    target = (plan.target[:, None] * place + torch.arange(place)).flatten()
    survivors = (plan.survivors[:, None] * place + torch.arange(place)).flatten()
    assert (plan.target >= 0).all()
    if isinstance(plan, WeighedPlan):
        return WeighedPlan(survivors, target, plan.weight.repeat_interleave(place))
    return FusionPlan(survivors, target)


def by_hand(model, inputs, modality, noted, proportional):
    """Pooled and DeepStack features of what is left, and which tokens these are, item by item."""
    visual = model.base_model.visual
    module = sys.modules[type(visual).__module__]
    group, grid = visual.spatial_merge_size**2, inputs[f"{modality}_grid_thw"]
    calls = []
    handles = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
        )
        for block in visual.blocks
    ]
    prompt_adapter(model, default_registry())._encode(inputs, modality)
    for handle in handles:
        handle.remove()
    grids = [(t, h // 2, w // 2) for t, h, w in grid.tolist()]
    total = sum(t * h * w for t, h, w in grids)
    order = torch.arange(total)
    if hasattr(visual, "fullatt_block_indexes"):
        order = module.get_vision_window_index(
            grid, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )[0]
    place = order.argsort().tolist()
    rows = calls[0][0].unflatten(0, (total, group))[order.argsort()]
    items, begin = [], 0
    for t, h, w in grids:
        items.append(Item(t * h * w, rows[begin : begin + t * h * w]))
        begin += t * h * w
    begins = [sum(t * h * w for t, h, w in grids[:i]) for i in range(len(grids))]
    if -1 in noted:
        for item, plan in zip(items, noted[-1], strict=True):
            item.follow(plan)
    deep = []
    for number, block in enumerate(visual.blocks):
        plans = list(noted.get(number, []))
        for item, (t, h, w) in zip(items, grids, strict=True):
            frames = bool(plans) and plans[0][1].frames
            if number in noted and not (frames and t == 1):
                plan = plans.pop(0)[0]
                plan = of_frames(plan, h * w) if frames else plan
                if plan is not None:
                    item.follow(plan)
        assert not plans
        # One sequence of tokens, in the order of the tower.
        alive = sorted(
            (place[begins[i] + m[0]], i, j)
            for i, item in enumerate(items)
            for j, m in enumerate(item.members)
        )
        kwargs = calls[number][1]
        ends = (kwargs["cu_seqlens"] // group).tolist()
        cos, sin = (x.unflatten(0, (total, group)) for x in kwargs["position_embeddings"])
        x = torch.cat([items[i].rows[j] for _, i, j in alive])
        sizes = [float(len(items[i].members[j])) for _, i, j in alive]
        normed, attention = block.norm1(x), block.attn
        q, k, v = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        where = [p for p, _, _ in alive]
        q, k = module.apply_rotary_pos_emb_vision(
            q, k, cos[where].flatten(0, 1), sin[where].flatten(0, 1)
        )
        made = torch.zeros_like(q)
        for start, stop in itertools.pairwise(ends):
            own = [a for a, p in enumerate(where) if start <= p < stop]
            if not own:
                continue
            index = torch.tensor([a * group + g for a in own for g in range(group)])
            logits = torch.einsum("qhd,khd->hqk", q[index], k[index]) * attention.scaling
            if proportional:
                logits = logits + torch.tensor([sizes[a] for a in own]).log().repeat_interleave(
                    group
                )
            made[index] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[index])
        x = x + attention.proj(made.flatten(1))
        x = x + block.mlp(block.norm2(x))
        for (_, i, j), states in zip(alive, x.unflatten(0, (-1, group)), strict=True):
            items[i].rows[j] = states
        if number in getattr(visual, "deepstack_visual_indexes", ()):
            index = list(visual.deepstack_visual_indexes).index(number)
            merger = visual.deepstack_merger_list[index]
            level = []
            for item in items:
                own = merger(torch.cat(item.rows))
                level.append({m: own[j] for j, ms in enumerate(item.members) for m in ms})
            deep.append(level)
    pooled = [visual.merger(torch.cat(item.rows)) for item in items]
    kept = [[m[0] for m in item.members] for item in items]
    levels = [
        torch.stack(
            [
                sum(level[i][m] for m in ms) / len(ms)
                for i, item in enumerate(items)
                for ms in item.members
            ]
        )
        for level in deep
    ]
    return torch.cat(pooled), levels, kept, items


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", QWEN)
@torch.no_grad()
def test_the_tower_is_what_it_is_by_hand(name, case):
    model, inputs = FAMILIES[name].build("sdpa"), FAMILIES[name].prompt(PROMPT, "left")
    noted = []
    inner = tokenfuse.get_strategy(CASES[case])
    short = tokenfuse.compress(model, inputs, Recorded(inner=inner, noted=noted))
    # The tower reads images first, then videos.
    for modality, mine in zip(("image", "video"), noted[-2:], strict=True):
        pooled, levels, kept, items = by_hand(
            model, inputs, modality, mine, "plain" not in case and "tome" in case
        )
        found = short["mm_encoder_outputs"][modality]
        plans = short.plans[modality]
        assert [plan.survivors.tolist() for plan in plans] == kept
        for plan, item in zip(plans, items, strict=True):
            for slot, members in enumerate(item.members):
                assert sorted(members) == (plan.target == slot).nonzero().flatten().tolist()
        pairs = [(found.pooler_output, pooled)]
        if levels:
            pairs += zip(found.deepstack_features, levels, strict=True)
        for few, expected in pairs:
            few = few if isinstance(few, torch.Tensor) else torch.cat(list(few))
            torch.testing.assert_close(few.flatten(0, -2), expected, atol=1e-5, rtol=1e-4)
    removed = sum(item.tokens_before - item.tokens_after for item in short.report.items)
    # Of frames of noise perhaps no two are alike enough.
    assert removed > 0 or case == "earlytom"


def still(name, frames=8):
    """A prompt of one video whose frames are all the same, and its number of frames."""
    family = FAMILIES[name]
    inputs = dict(family.prompt([[("text", 2), ("video", frames), ("text", 3)]], "left"))
    pixels = inputs[PIXELS["video"]].clone()
    if name in FRAMES:
        pixels[:] = pixels[:, :1]
        count = pixels.shape[1]
    else:
        count, h, w = inputs["video_grid_thw"][0].tolist()
        pixels[:] = pixels[: h * w].repeat(count, 1)
    inputs[PIXELS["video"]] = pixels
    return family.build("sdpa"), inputs, count


@pytest.mark.parametrize("name", [*QWEN, *FRAMES])
@torch.no_grad()
def test_alike_frames_merge_and_lose_nothing(monkeypatch, name):
    """Groups of six keep their first and last frame, and two means of those between."""
    monkeypatch.setattr(families, "FRAMES", 8)
    model, inputs, frames = still(name)
    before = tokenfuse.compress(model, inputs, "uniform", keep_ratio=1.0)
    short = tokenfuse.compress(model, inputs, "earlytom", blocks=[9])
    item = short.report.items[0]
    place = item.grid[1] * item.grid[2]
    groups = [min(6, frames - start) for start in range(0, frames, 6)]
    left = sum(n if n < 3 else 2 + -(-(n - 2) // 2) for n in groups)
    assert item.tokens_after == left * place < item.tokens_before
    assert item.tower_tokens == [frames * place, *[left * place] * (len(item.tower_tokens) - 1)]
    report = short.report
    assert 0 < report.tower_flops_after < report.tower_flops_before
    # Frames that are the same are the same as their mean.
    features, whole = (
        flat(x["mm_encoder_outputs"]["video"].pooler_output) for x in (short, before)
    )
    tokens = short.plans["video"][0].survivors
    # The class tokens of video_llava's frames stand between.
    if name != "video_llava":
        torch.testing.assert_close(features[: left * place], whole[tokens], atol=1e-5, rtol=1e-4)
    out = model.generate(**short, max_new_tokens=3)
    assert out.shape[1] == short["input_ids"].shape[1] + 3


def flat(features):
    if not isinstance(features, torch.Tensor):
        features = torch.cat(list(features))
    return features.flatten(0, -2)


@pytest.mark.parametrize("name", FRAMES)
@torch.no_grad()
def test_towers_of_whole_frames_are_what_they_are_by_hand(name):
    """The tower's layers, run on a batch that is shorter from two of them on."""
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].prompt([[("text", 1), ("video", 5), ("text", 2)]], "left")
    noted = []
    strategy = Recorded(inner=Halves(), noted=noted)
    short = tokenfuse.compress(model, inputs, strategy)
    adapter = prompt_adapter(model, default_registry())
    plans = {block: own[0][0] for block, own in noted[-1].items()}
    layers, tower = adapter.tower_blocks, adapter.tower("video")
    members, hidden = [[t] for t in range(inputs[PIXELS["video"]].shape[1])], []

    def at_input(number):
        def hook(module, args):
            nonlocal members
            x = args[0][[own[0] for own in members]]
            if number in plans:
                item = Item(0, x)
                item.members = members
                item.follow(plans[number])
                members, x = item.members, torch.stack(item.rows)
            return (x, *args[1:])

        return hook

    def at_output(module, args, output):
        whole = torch.zeros(sum(map(len, members)), *output.shape[1:])
        for row, own in zip(output, members, strict=True):
            whole[own] = row
        hidden.append(whole)
        return whole

    handles = [
        handle
        for number, layer in enumerate(layers)
        for handle in (
            layer.register_forward_pre_hook(at_input(number)),
            layer.register_forward_hook(at_output, prepend=True),
        )
    ]
    whole = flat(adapter._encode(inputs, "video").pooler_output)
    for handle in handles:
        handle.remove()
    assert len(members) == inputs[PIXELS["video"]].shape[1] - 2
    found = flat(short["mm_encoder_outputs"]["video"].pooler_output)
    span = adapter.spans(inputs, "video", [whole])[0]
    frames = whole[: span.num_tokens + span.per_frame * span.grid[0]]
    frames = frames.view(span.grid[0], -1, whole.shape[-1])[:, span.per_frame :]
    expected = torch.stack([frames[own].mean(0) for own in members]).flatten(0, 1)
    kept = short.plans["video"][0]
    assert kept.num_kept == len(expected)
    others = len(found) - len(expected)
    if not span.per_frame:
        torch.testing.assert_close(found[: len(found) - others], expected, atol=1e-5, rtol=1e-4)
    else:
        rows = found.view(-1, whole.shape[-1])
        match = (rows[:, None] - expected[None]).abs().amax(-1).amin(0)
        assert float(match.max()) < 1e-5
    assert not any(m._forward_pre_hooks for m in tower.modules())


INSIDE = {
    "uniform": {"strategy": "uniform", "vision_block": 1},
    "tome": {"strategy": "tome", "tower": True},
    "frames": Halves(),
    "pixels": Pixels(),
}
inside = pytest.mark.parametrize("case", INSIDE)


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(case, dtype):
    """Features of survivors are those of fp32, but for the rounding of the dtype."""
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    noted = []
    strategy = Recorded(inner=tokenfuse.get_strategy(INSIDE[case]), noted=noted)
    whole = tokenfuse.compress(model, inputs, strategy)
    half = FAMILIES["qwen3_vl"].build("sdpa").to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    short = tokenfuse.compress(half, inputs, strategy)
    found = flat(short["mm_encoder_outputs"]["video"].pooler_output)
    expected = flat(whole["mm_encoder_outputs"]["video"].pooler_output)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert bool(found.isfinite().all())
    if case != "tome":  # rounding changes what is most alike
        error = (found.float() - expected).norm() / expected.norm()
        assert float(error) < (0.1 if dtype == torch.bfloat16 else 0.02)


@inside
@torch.no_grad()
def test_autocast(case):
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    kinds = []

    class Looks(Recorded):
        name = "looks"

        def tower_cuts(self, blocks):
            def looking(cut):
                def plan(tokens):
                    kinds.append((tokens.states.float() @ tokens.states.float().mT).dtype)
                    return cut.plan(tokens)

                return TowerCut(cut.block, plan, cut.frames, cut.keys, cut.proportional)

            return tuple(map(looking, self.inner.tower_cuts(blocks)))

    strategy = Looks(inner=tokenfuse.get_strategy(INSIDE[case]), noted=[{}])
    whole = tokenfuse.compress(model, inputs, tokenfuse.get_strategy(INSIDE[case]))
    with torch.autocast("cpu", torch.bfloat16):
        short = tokenfuse.compress(model, inputs, strategy)
    assert set(kinds) <= {torch.float32}
    assert short.report.tokens_after == whole.report.tokens_after
    features = flat(short["mm_encoder_outputs"]["video"].pooler_output)
    assert bool(features.isfinite().all())


@inside
def test_gradients_reach_what_is_before_a_cut(case):
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    model.train()
    short = tokenfuse.compress(model, inputs, tokenfuse.get_strategy(INSIDE[case]))
    model(**short, labels=short["input_ids"]).loss.backward()
    for block in model.base_model.visual.blocks:
        gradients = [p.grad for p in block.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
        assert any(float(g.abs().max()) > 0 for g in gradients)
    model.base_model.visual.blocks[0].gradient_checkpointing = True
    with pytest.raises(UnsupportedModelError, match="switch that off"):
        tokenfuse.compress(model, inputs, tokenfuse.get_strategy(INSIDE[case]))


@inside
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_exceptions_leave_no_hook(name, case):
    model, inputs = FAMILIES[name].build("sdpa"), FAMILIES[name].prompt(PROMPT, "left")
    visual = model.base_model.visual

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        before = visual(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    handle = visual.blocks[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tokenfuse.compress(model, inputs, tokenfuse.get_strategy(INSIDE[case]))
    handle.remove()
    assert not any(x._forward_pre_hooks for x in visual.modules())
    with torch.no_grad():
        after = visual(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    assert torch.equal(before, after)


@torch.no_grad()
def test_cuts_that_keep_all_are_bit_for_bit_nothing():
    for name in (*QWEN, *FRAMES):
        model = FAMILIES[name].build("sdpa")
        inputs = FAMILIES[name].prompt([PROMPT[0]], "left")
        whole = model(**tokenfuse.compress(model, inputs, "uniform", keep_ratio=1.0)).logits
        for strategy in (
            {"strategy": "earlytom", "threshold": 1.0, "most_frames": 1},
            {"strategy": "uniform", "vision_block": 1, "keep_ratio": 1.0},
            {"strategy": "tome", "tower": True, "keep_ratio": 1.0},
        ):
            if name in FRAMES and strategy["strategy"] != "earlytom":
                continue
            short = tokenfuse.compress(model, inputs, strategy)
            assert torch.equal(model(**short).logits, whole), (name, strategy)


@torch.no_grad()
def test_sessions_batches_turns_and_chains():
    """A chain over all stages: tower, features, LLM; then a question about the prompt."""
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    never = [model.config.image_token_id, model.config.video_token_id]
    chain = {
        "compose": [
            Pixels(),
            {"strategy": "random", "vision_block": 1, "keep_ratio": 0.8},
            {"strategy": "uniform", "keep_ratio": 0.5},
            {"strategy": "fastv", "layer": 1},
        ]
    }
    with tokenfuse.attach(model, chain) as session:
        prompt = session.prefill(inputs)
        report = session.report
        out = session.ask(prompt, torch.full((2, 3), 7), max_new_tokens=3, suppress_tokens=never)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 6)
    read = zip(*(item.tower_tokens for item in report.items), strict=True)
    first, second, third = map(sum, read)
    assert report.tokens_before > first > second == third > report.tokens_after
    assert sum(report.layer_tokens[1]) < sum(report.layer_tokens[0]) == report.tokens_after
    text = str(report)
    assert "vision tower  blocks 0: " in text
    assert "in the LLM" in text


def test_threads_cut_towers_by_themselves():
    model = FAMILIES["qwen3_vl"].build("sdpa")
    inputs = FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    cases = [*INSIDE, None]
    expected, found = {}, {}

    @torch.no_grad()
    def run(case):
        strategy = "uniform" if case is None else tokenfuse.get_strategy(INSIDE[case])
        short = tokenfuse.compress(model, inputs, strategy)
        return flat(short["mm_encoder_outputs"]["video"].pooler_output)

    for case in cases:
        expected[case] = run(case)

    def repeat(case):
        found[case] = [run(case) for _ in range(3)]

    threads = [threading.Thread(target=repeat, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for case in cases:
        assert all(torch.equal(each, expected[case]) for each in found[case]), case


def test_saliency_behind_a_cut_is_that_of_what_was_read():
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    seen = []

    class Sees(Strategy):
        name = "sees"
        needs = frozenset({"saliency"})

        def plan(self, tokens):
            seen.append(tokens)
            return FusionPlan.identity(tokens.num_tokens)

    for case in ("uniform", "pixels", "frames"):
        seen.clear()
        chain = tokenfuse.get_strategy({"compose": [tokenfuse.get_strategy(INSIDE[case]), Sees()]})
        tokenfuse.compress(model, inputs, chain)
        for tokens in seen:
            # What a frame's patches pay to each other sums to one, shared by those merged.
            frames = tokens.coords[:, 0].unique()
            total = tokens.saliency.sum()
            assert float(tokens.saliency.min()) > 0
            torch.testing.assert_close(total, torch.tensor(float(len(frames))), rtol=1e-4, atol=0)
    with pytest.raises(UnsupportedModelError, match="another kernel weighs tokens"):
        tokenfuse.compress(model, inputs, {"compose": [INSIDE["tome"], Sees()]})


REFUSED = {
    "two places": (
        {"strategy": "uniform", "vision_block": 1, "layer": 2},
        ConfigError,
        "one place",
    ),
    "no block": ({"strategy": "uniform", "vision_block": 3}, ConfigError, "expected 0 to 2"),
    "the other way": (
        {"compose": ["uniform", {"strategy": "uniform", "vision_block": 1}]},
        ConfigError,
        "expected them the other way round",
    ),
    "falling blocks": (
        {
            "compose": [
                {"strategy": "uniform", "vision_block": 2},
                {"strategy": "random", "vision_block": 1},
            ]
        },
        ConfigError,
        "each block once, rising",
    ),
    "tome second": (
        {"compose": [{"strategy": "uniform", "vision_block": 0}, INSIDE["tome"]]},
        ConfigError,
        "tome needs every place",
    ),
    "by modality": (
        {"video": {"strategy": "uniform", "vision_block": 0}},
        ConfigError,
        "before or inside the vision tower; put it",
    ),
    "frames after pixels": (
        {"compose": [Pixels(), Halves()]},
        PlanError,
        "merges whole frames at vision block 1",
    ),
    # Half of the tokens of four frames are as many as those of two.
    "frames after tokens": (
        {"compose": [{"strategy": "uniform", "vision_block": 0}, Halves()]},
        PlanError,
        "and tokens went before it",
    ),
    "merges beyond the tower": (
        {"strategy": "tome", "tower": True, "r": [0, 0, 1]},
        ConfigError,
        "there are 2 places",
    ),
    "a share of the tower's own": (
        {"compose": [{"strategy": "uniform", "vision_block": 0}], "keep_ratio": 0.25},
        ConfigError,
        "acts before or inside the vision tower alone",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_what_can(case):
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    configuration, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        tokenfuse.compress(model, inputs, configuration)


@pytest.mark.parametrize("name", ["llava_onevision", "llava", "glm4v", "internvl"])
def test_other_towers_refuse_tokens_by_name(name):
    model = FAMILIES[name].build("sdpa")
    for strategy in ("pixelprune", INSIDE["uniform"], INSIDE["tome"]):
        with pytest.raises(UnsupportedModelError, match=f"model family {name} is one whose vision"):
            tokenfuse.attach(model, strategy)
    if name != "llava_onevision":
        with pytest.raises(UnsupportedModelError, match="has to read everything"):
            tokenfuse.attach(model, "earlytom")


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_tower_that_was_compiled_before_is_right_or_refused():
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")

    def run(case):
        strategy = "uniform" if case is None else tokenfuse.get_strategy(INSIDE[case])
        short = tokenfuse.compress(model, inputs, strategy)
        return flat(short["mm_encoder_outputs"]["video"].pooler_output)

    cases = [None, "frames"]
    expected = {case: run(case) for case in cases}
    torch.compiler.reset()
    try:
        for block in model.base_model.visual.blocks:
            block.compile(backend="eager")
        for case in [*cases, *cases]:
            torch.testing.assert_close(run(case), expected[case], atol=1e-5, rtol=1e-4)
        # It listens to what stands inside of blocks.
        with pytest.raises(UnsupportedModelError, match="no part was compiled before"):
            run("tome")
        torch.testing.assert_close(run(None), expected[None], atol=1e-5, rtol=1e-4)
    finally:
        torch.compiler.reset()


class Wrong(TowerStrategy):
    """Asks for what no tower can give."""

    name = "wrong"
    found: object = None

    def tower_cuts(self, blocks):
        return self.found


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([(1, {}), (1, {})], r"vision blocks \[1, 1\], in this order"),
        ([(2, {}), (1, {})], r"vision blocks \[2, 1\], in this order"),
        ([(0, {"keys": True})], "no block is before it"),
        ([(1, {"keys": True, "frames": True})], "a cut of whole frames"),
        ([(1, {"proportional": True, "frames": True})], "a cut of whole frames"),
        ([(3, {})], "expected 0 to 2"),
    ],
)
def test_cuts_that_no_tower_can_make_are_refused_when_attached(cuts, message):
    found = tuple(TowerCut(block, lambda tokens: None, **options) for block, options in cuts)
    with pytest.raises(ConfigError, match=message):
        tokenfuse.attach(FAMILIES["qwen3_vl"].build("sdpa"), Wrong(found=found))


@torch.no_grad()
def test_an_image_alone_has_no_frames_to_merge():
    model = FAMILIES["qwen3_vl"].build("sdpa")
    inputs = FAMILIES["qwen3_vl"].prompt([[("text", 1), ("image", 2), ("text", 2)]], "left")
    short = tokenfuse.compress(model, inputs, {"compose": [Pixels(), Halves()]})
    assert short.report.items[0].tower_tokens == [short.report.tokens_after] * 3


@torch.no_grad()
def test_the_share_of_a_chain_is_of_all_tokens():
    """Whatever the tower has left of them, and for a step that acts at both places."""
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    first = {"strategy": "uniform", "vision_block": 0, "keep_ratio": 0.8}
    short = tokenfuse.compress(model, inputs, {"compose": [first, "uniform"], "keep_ratio": 0.25})
    for item in short.report.items:
        assert item.tokens_after == -(-item.tokens_before // 4)
    model, inputs, _ = still("qwen3_vl")
    chain = {"compose": [{"strategy": "earlytom", "keep_ratio": 0.9}], "keep_ratio": 0.25}
    item = tokenfuse.compress(model, inputs, chain).report.items[0]
    assert item.tokens_after == -(-item.tokens_before // 4)


def test_bare_tokens_have_no_tower():
    tokens = tokenfuse.VisualTokens.from_grid(torch.randn(24, 4), (2, 3, 4))
    for strategy in (
        {"strategy": "uniform", "vision_block": 1},
        {"strategy": "tome", "tower": True},
        {"compose": ["pixelprune", "uniform"]},
        {"compose": [INSIDE["tome"], "uniform"]},
        {"strategy": "earlytom"},
    ):
        with pytest.raises(ConfigError, match="expected compress or attach on a model"):
            tokenfuse.get_strategy(strategy).compress(tokens)


@pytest.mark.parametrize("name", ["video_llava", "qwen3_vl"])
def test_frames_that_are_images_are_refused_when_attached(name):
    model = FAMILIES[name].build("sdpa")
    with pytest.raises(ConfigError, match="frames_as_images=False"):
        tokenfuse.attach(model, "earlytom", frames_as_images=True)


@torch.no_grad()
def test_reports_say_why_an_item_is_whole_and_what_the_tower_read_of_it():
    model, inputs = FAMILIES["qwen3_vl"].build("sdpa"), FAMILIES["qwen3_vl"].prompt(PROMPT, "left")
    report = tokenfuse.compress(model, inputs, "pixelprune").report
    assert {item.reason for item in report.items} == {"the strategy kept every token"}
    assert report.tower_ms > 0
    assert report.tower_flops_before == report.tower_flops_after > 0
    assert [sum(block) for block in report.tower_tokens] == [report.tokens_before] * 3
    image = next(item for item in report.items if item.modality == "image")
    early = tokenfuse.compress(model, inputs, "earlytom").report
    assert "one frame only, and earlytom compares frames" in {i.reason for i in early.items}
    # What is counted of an item is its own.
    alone = FAMILIES["qwen3_vl"].prompt([[("text", 1), ("image", 2), ("text", 2)]], "left")
    (own,) = tokenfuse.compress(model, alone, "pixelprune").report.items
    assert own.tower_flops_before == image.tower_flops_before
    attention, width = model.base_model.visual.blocks[0].attn, 32
    weights = sum(p.numel() for p in model.base_model.visual.blocks[0].parameters() if p.ndim == 2)
    patches = own.tokens_before * 4
    assert attention.qkv.weight.shape[0] == 3 * width
    assert own.tower_flops_before == 3 * (weights * patches + 2 * width * patches**2)


@torch.no_grad()
def test_a_later_turn_reports_the_whole_conversation():
    """Of frames' towers, too, where an image that follows is read whole."""
    model, family = FAMILIES["llava_onevision"].build("sdpa"), FAMILIES["llava_onevision"]
    never = [model.config.image_token_id, model.config.video_token_id]
    options = {"max_new_tokens": 3, "suppress_tokens": never, "return_dict_in_generate": True}
    begun = family.prompt([[("text", 1), ("video", 1), ("text", 2)]], "left")
    with tokenfuse.attach(model, Halves()) as session:
        first = model.generate(**begun, **options)
        before = session.report
        more = family.prompt([[("text", 1), ("video", 1), ("text", 2), ("image", 2), ("text", 3)]])
        new = more["input_ids"].shape[1] - begun["input_ids"].shape[1]
        ids = torch.cat([first.sequences, more["input_ids"][:, -new:]], -1)
        later = {**more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model.generate(**later, **options, **as_argument(cache_of(first)))
    report = session.report
    assert len(report.items) > len(before.items) == 1
    assert report.tower_flops_before == before.tower_flops_before > before.tower_flops_after > 0
    whole = sum(item.tokens_before for item in report.items if item.modality == "image")
    assert [sum(block) for block in report.tower_tokens] == [
        sum(block) + whole for block in before.tower_tokens
    ]


def test_weights_of_what_is_merged_are_not_rounded():
    plan = FusionPlan.from_roots(torch.tensor([0]), torch.tensor([0, 0]))
    states = torch.ones(2, 1, 3, dtype=torch.float16)
    made = merged(plan, states, torch.tensor([70_000, 1]))
    assert torch.equal(made, torch.ones(1, 1, 3, dtype=torch.float16))


def test_costs_of_matching_are_those_of_what_runs_behind_the_tower():
    grid = (4, 3, 3)
    ttf = tokenfuse.get_strategy("ttf").matching_flops(grid, 8)
    chain = tokenfuse.get_strategy({"compose": ["pixelprune", "ttf"]})
    assert chain.matching_flops(grid, 8) == ttf > 0
    assert tokenfuse.get_strategy(INSIDE["tome"]).matching_flops(grid, 8) == 0
    assert tokenfuse.get_strategy({"compose": ["pixelprune"]}).matching_flops(grid, 8) == 0


def test_a_share_of_tome_is_its_only_schedule():
    strategy = tokenfuse.get_strategy("tome", tower=True, r=(1, 2)).at_share(0.3, 4)
    assert (strategy.keep_ratio, strategy.r) == (0.3, None)
    assert hash(tokenfuse.get_strategy("tome", r=[1, 2]))
