"""Strategies that act inside the LLM give what the published code gives.

The vectors in ``tests/data/llm`` hold queries and keys, hidden states and what became of them.
Attention is scored from the queries and keys.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tokenfuse import get_strategy
from tokenfuse.ops.row_attention import row_attention
from tokenfuse.strategies._layers import LayerTokens, StepState
from tokenfuse.strategies.framefusion import same_place, share_to_remove
from tokenfuse.strategies.sparsevlm import raters, recycled
from tokenfuse.strategies.vitcop import cluster_plan, key_lengths
from tokenfuse.tokens import VisualTokens, grid_coords

DATA = Path(__file__).parents[1] / "data/llm"


def cases(name):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        # Not a mapping: it can be asked for its keys, but not iterated.
        return sorted({key.split(".")[0] for key in file.keys()})  # noqa: SIM118


def each(name):
    return pytest.mark.parametrize("case", cases(name))


def read(name, case):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        # Not a mapping: it can be asked for its keys, but not iterated.
        keys = [key for key in file.keys() if key.startswith(f"{case}.")]  # noqa: SIM118
        tensors = {key.partition(".")[2]: file.get_tensor(key) for key in keys}
        return json.loads(file.metadata()[case]), tensors


def tokens_of(states, visual, layer=2, **read):
    """One prompt at a layer; ``visual``: which rows are."""
    n = len(visual)
    given = {
        "states": states,
        "visual": visual,
        "coords": torch.zeros(n, 3, dtype=torch.long),
        "item": torch.zeros(n, dtype=torch.long),
        "sizes": torch.ones(n, dtype=torch.long),
        "grids": ((1, 1, n),),
        "original": n,
        "source": n,
        "layer": layer,
        "num_layers": 32,
    }
    return LayerTokens(**(given | read))


def span(parameters):
    return torch.arange(parameters["V"]) + parameters["prefix"]


def attention_of(given, scale=None):
    queries = given["query"]
    return row_attention(queries, given["key"], queries.shape[-1] ** -0.5)


def cut(strategy, tokens):
    """The plan of the strategy's cut at the layer of the tokens, and what it leaves."""
    (found,) = [one for one in strategy.cuts() if one.layer == tokens.layer]
    plan = found.plan(tokens)
    plan.check(tokens.num_visual)
    fuse = found.fuse or (lambda plan, x: plan.select(x))
    return plan, fuse(plan, tokens.features)


def near(mine, theirs, atol=1e-5):
    torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-5)


@each("flashvid_late")
def test_the_late_cut_of_flashvid(case):
    parameters, given = read("flashvid_late", case)
    attention = attention_of(given)
    near(attention[:, 0], given["attention"])
    visual = given["visual_mask"].nonzero().flatten()
    tokens = tokens_of(given["hidden"], visual, layer=20, attention=attention)
    near(tokens.scores(), given["scores"])
    strategy = get_strategy("fastv", layer=20, keep_ratio=parameters["ratio"])
    plan, left = cut(strategy, tokens)
    assert plan.survivors.tolist() == given["kept_visual"].tolist()
    assert torch.equal(left, given["hidden"][visual[given["kept_visual"]]])


@each("pyramiddrop")
def test_pyramiddrop(case):
    parameters, given = read("pyramiddrop", case)
    prefixes = sorted({key.rpartition(".")[0] for key in given if key.endswith(".kept")})
    assert prefixes
    for prefix in prefixes:
        own = {key: given[f"{prefix}.{key}"] for key in ("query", "key", "attention", "scores")}
        rows = given[f"{prefix}.query_rows"]
        entries = torch.arange(own["key"].shape[1])
        # In training there are several, each of which sees what stands before it.
        attention = row_attention(
            own["query"],
            own["key"],
            own["query"].shape[-1] ** -0.5,
            None if len(rows) == 1 else entries <= rows[:, None],
        )
        near(attention, own["attention"])
        sample = int(prefix.partition("sample")[2] or 0)
        if "sample" not in prefix and len(parameters["samples"]) > 1:
            sample = next(i for i, (_, v, _) in enumerate(parameters["samples"]) if v)
        begin, first, _ = parameters["samples"][sample]
        kept, n = given[f"{prefix}.kept"], len(own["scores"])
        stage = int(prefix.removeprefix("stage").partition(".")[0])
        tokens = tokens_of(
            torch.zeros(len(entries), 2),
            torch.arange(n) + begin,
            layer=8 * (stage + 1),
            attention=attention,
            source=first,
        )
        near(tokens.scores(), own["scores"])
        assert len(kept) == int(first * parameters["ratios"][stage + 1])
        ratios = (1.0, 1.0, 1.0)[:stage] + (len(kept) / first,) * (3 - stage)
        strategy = get_strategy("pyramiddrop", keep_ratio=ratios)
        assert strategy.cuts()[stage].own
        assert cut(strategy, tokens)[0].survivors.tolist() == kept.tolist()


@each("sparsevlm")
def test_sparsevlm(case):
    parameters, given = read("sparsevlm", case)
    visual, version = span(parameters), {"1": "v1", "2": "v2"}.get(parameters["version"], "video")
    start = tokens_of(given["embeds"], visual, layer=0)
    found = raters(start)
    assert (found - int(visual[-1]) - 1).tolist() == given["rater_index"].tolist()
    sizes = torch.ones(len(visual), dtype=torch.long)
    for stage in range(parameters["stages"]):
        own = {
            key.partition(".")[2]: value
            for key, value in given.items()
            if key.startswith(f"stage{stage}.")
        }
        states, n = own["hidden"], len(own["scores"])
        visual = torch.arange(n) + parameters["prefix"]
        rows = own["raters"]
        text = rows - (len(states) - own["query"].shape[1])
        entries = torch.arange(len(states))
        attention = row_attention(
            own["query"][:, text], own["key"], parameters["d"] ** -0.5, entries <= rows[:, None]
        )
        near(attention, own["attention"])
        rope = None
        if version == "v2":
            half = parameters["d"] // 2
            angles = own["position_ids"][:, None] * 1e4 ** -(torch.arange(half) / half)
            rope = tuple(torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        tokens = tokens_of(
            states, visual, layer=3, attention=attention, rows=rows, rope=rope, sizes=sizes
        )
        kept = own["kept"]
        options = {"layers": 3, "version": version}
        if version == "v2":
            options["heads"] = parameters["heads"]
        strategy = get_strategy("sparsevlm", keep_ratio=len(kept) / n, **options)
        if version == "v2":
            near(strategy.corrected(tokens), own["scores"])
            plan, left = cut(strategy, tokens)
            assert plan.survivors.tolist() == kept.tolist()
            assert torch.equal(left, tokens.features[kept])
            sizes = sizes[kept]
            continue
        near(tokens.scores(), own["scores"])
        plan, left = cut(strategy, tokens)
        for found in (plan, recycled(tokens, len(kept))):
            assert found.target[own["recycled"]].min() >= 0
            members = found.target >= 0
            assert members.nonzero().flatten().tolist() == sorted(
                [*kept.tolist(), *own["recycled"].tolist()]
            )
        # Ours stand in order of places; those that are no kept rows are the clusters.
        clusters = ~torch.isin(plan.survivors, kept)
        assert torch.equal(left[~clusters], tokens.features[kept])
        assign = plan.target[own["recycled"]]
        order = [int(assign[own["assign"] == c][0]) for c in range(int(own["assign"].max()) + 1)]
        assert [order[c] for c in own["assign"].tolist()] == assign.tolist()
        near(left[order], own["mended_merged"])
        if "centres" in own:
            centres = own["recycled"][own["centres"]]
            assert plan.survivors[order].tolist() == centres.tolist()
        sizes = own["sizes_out"]
        slots = torch.where(plan.target < 0, plan.num_kept, plan.target)
        mine = torch.zeros(plan.num_kept + 1, dtype=torch.long)
        mine = mine.index_add(0, slots, tokens.sizes)[:-1]
        assert [*mine[~clusters].tolist(), *mine[order].tolist()] == sizes.tolist()


@each("dycoke")
def test_the_cache_stage_of_dycoke(case):
    parameters, given = read("dycoke", case)
    for video in range(parameters.get("videos", 1)):
        strategy = get_strategy(
            "dycoke", cache_layer=3, cache_keep_ratio=round(1 - parameters["p"], 9) or 1e-9
        )
        pruning, state = strategy.cache_pruning(), StepState()
        begin, count = parameters["prefix"], parameters["visual"]
        query, key = given[f"video{video}.query"], given[f"video{video}.key"]
        length = key.shape[1] - parameters["steps"]
        for step in range(parameters["steps"]):
            own = f"video{video}.step{step}."
            seen = length + step + 1
            attention = row_attention(
                query[:, step : step + 1], key[:, :seen], parameters["d"] ** -0.5
            )[:, 0]
            near(attention, given[f"{own}attention"])
            chosen = pruning.choose(attention.mean(0)[begin : begin + count], state)
            read_of = torch.ones(seen, dtype=torch.bool)
            read_of[begin : begin + count] = chosen
            expected = given[f"{own}mended_cache"]
            assert read_of.nonzero().flatten().tolist() == expected.tolist(), step


@each("holitom")
def test_the_inner_merging_of_holitom(case):
    parameters, given = read("holitom", case)
    attention = attention_of(given)
    near(attention[:, 0], given["attention"])
    tokens = tokens_of(given["hidden"], span(parameters), layer=18, attention=attention)
    near(tokens.scores(), given["scores"])
    kept = given["kept"]
    strategy = get_strategy("holitom", inner_layer=18, inner_keep_ratio=len(kept) / parameters["V"])
    plan, left = cut(strategy, tokens)
    assert plan.survivors.tolist() == kept.tolist()
    keepers = plan.survivors[plan.target]
    assert keepers[given["dropped"]].tolist() == given["keeper"].tolist()
    near(left, given["mended_merged"])
    assert plan.sizes.tolist() == given["sizes"].tolist()


@each("dart")
def test_dart_at_a_layer(case):
    parameters, given = read("dart", case)
    weight = given["norm_weight"]

    def norm(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    near(norm(given["hidden"]), given["normed"])
    tokens = tokens_of(
        given["hidden"], span(parameters), layer=5, keys=given["key"].transpose(0, 1), norm=norm
    )
    expected = given["ordered_kept"]
    strategy = get_strategy(
        "dart",
        layer=5,
        keep_ratio=len(expected) / parameters["V"],
        image_pivots=parameters["image_pivots"],
        text_pivots=parameters["text_pivots"],
    )
    assert strategy.cuts()[0].keys
    assert cut(strategy, tokens)[0].survivors.tolist() == expected.tolist()


@each("vitcop")
def test_vitcop(case):
    parameters, given = read("vitcop", case)
    tokens = tokens_of(
        given["hidden"], span(parameters), layer=22, keys=given["key"].transpose(0, 1)
    )
    lengths = key_lengths(tokens)
    near(lengths, given["norms"])
    if "kept" in given:
        strategy = get_strategy(
            "vitcop", layers=22, keep_ratio=parameters["keep"] / parameters["V"]
        )
        assert cut(strategy, tokens)[0].survivors.tolist() == given["kept"].tolist()
        return
    plan = cluster_plan(lengths, given["labels"], parameters["keep"], torch.ones(parameters["V"]))
    plan.check(parameters["V"])
    assert plan.num_kept == parameters["keep"]
    assert plan.survivors.tolist() == given["place"].tolist()
    assert plan.target.tolist() == given["group"].tolist()
    assert plan.sizes.tolist() == given["sizes"].tolist()
    near(plan.mean(tokens.features), given["mended_merged"])


@each("framefusion")
def test_framefusion(case):
    parameters, given = read("framefusion", case)
    grid, begin = tuple(parameters["grid"]), parameters["before"]
    n = grid[0] * grid[1] * grid[2]
    visual = torch.arange(begin, begin + n)
    features, coords = given["hidden"][visual], grid_coords(grid)
    item = torch.zeros(n, dtype=torch.long)
    similarity, _ = same_place(features, coords, item)
    near(similarity, given["similarity"][visual], atol=1e-4)
    strategy = get_strategy("framefusion", threshold=parameters["similarity"])
    plan = strategy.merged(features, coords, item, torch.ones(n), n)
    kept = given["keep"].nonzero().flatten()
    visual_kept = kept[(kept >= begin) & (kept < begin + n)]
    assert (plan.survivors + begin).tolist() == visual_kept.tolist()
    merged = given["merged"][begin : begin + len(visual_kept)]
    near(strategy.fuse(plan, features), merged)


def test_a_slow_turn_is_one_token_for_neighbours_and_several_for_the_first():
    angles = torch.linspace(0, 3.0, 31)
    features = torch.stack([angles.cos(), angles.sin()], -1)
    tokens = VisualTokens.from_grid(features, (31, 1, 1))
    plans = {
        link: get_strategy("framefusion", cost=0.01, threshold=0.6, link=link).plan(tokens)
        for link in ("neighbour", "first")
    }
    assert plans["neighbour"].num_kept == 1
    first = plans["first"]
    assert 2 < first.num_kept < 8
    cosines = (features * features[first.survivors[first.target]]).sum(-1)
    assert float(cosines.min()) >= 0.6


def test_the_share_that_framefusion_may_remove():
    with safe_open(DATA / "framefusion.safetensors", "pt") as file:
        ratios = json.loads(file.metadata()["ratios"])
    for given in ratios:
        share = share_to_remove(given["dropped"], given["cost"], given["layers"])
        assert share == pytest.approx(given["ratio"], abs=1e-9)


def by_hand(query, key, visual, count):
    """FastV, from its rule: the last row's softmax, mean over heads, the greatest."""
    heads, groups = len(query), len(key)
    maps = []
    for h in range(heads):
        logits = query[h, -1] @ key[h * groups // heads].T / query.shape[-1] ** 0.5
        maps.append(logits.softmax(-1))
    scores = torch.stack(maps).mean(0)[visual]
    return sorted(sorted(range(len(visual)), key=lambda i: (-float(scores[i]), i))[:count])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fastv_takes_what_the_last_token_attends_to(groups):
    rng = torch.Generator().manual_seed(groups)
    query, key = (torch.randn(n, 61, 8, generator=rng) for n in (4, groups))
    visual = torch.arange(5, 50)
    attention = row_attention(query[:, -1:], key, 8**-0.5)
    tokens = tokens_of(torch.zeros(61, 2), visual, attention=attention)
    for count in (1, 22, 44):
        plan, _ = cut(get_strategy("fastv", keep_ratio=count / 45), tokens)
        assert plan.survivors.tolist() == by_hand(query, key, visual, count)
