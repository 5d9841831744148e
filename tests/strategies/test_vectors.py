"""Strategies against what the published code gives for the same inputs.

Each file of ``tests/data`` holds inputs and outputs of one method; the metadata of a case say which
settings it has, and of which faults of the original it is mended. Numbers only, no code.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tokenfuse import VisualTokens, get_strategy

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[1] / "data"
OPTIONS = {
    "ttf": lambda p: {k: p[k] for k in ("threshold", "window")},
    "fastvid": lambda p: {
        "keep_ratio": p["keep_ratio"],
        "segments": p["c"],
        "threshold": p["tau"],
        "alike": p["ignore"],
        "context": p["d"],
        "anchor_every": p["p"],
        "beta": p["beta"],
    },
    "tomesd": lambda p: {k: p[k] for k in ("sx", "sy", "destination", "seed")},
    "vcast": lambda p: {"temperature": p["temperature"]},
    "holitom": lambda p: {
        "threshold": p["tau"],
        "contextual": p["D"],
        "beta": p["beta"],
        "neighbours": p["K"],
    },
    "dycoke": lambda p: {"frame_keep_ratio": 1 - p["merging_ratio"]},
    "visionzip": lambda p: {"dominant": p["dominant"], "contextual": p["contextual"]},
    "cdpruner": lambda p: {"relevance_weight": p["theta"]},
    "dart": lambda p: {k: p[k] for k in ("image_pivots", "text_pivots")},
}
"""The options of a case, by our names."""
MERGED = {"fastvid": "merged_one", "holitom": "merged", "tomesd": "merged", "visionzip": "merged"}
"""Which tensor holds the survivors' values."""
ROOTS = ("ttf", "fastvid", "holitom", "tomesd")
EXACT = ("ttf", "dycoke", "visionzip")
"""Methods whose own options fix the count."""


def cases():
    for name in OPTIONS:
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            # Not a mapping: it can be asked for its keys, but not iterated.
            numbers = sorted({key.split(".")[0] for key in file.keys()})  # noqa: SIM118
        for case in numbers:
            yield pytest.param(name, case, id=f"{name}-{case}")


def read(name, case):
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        # Not a mapping: it can be asked for its keys, but not iterated.
        keys = [key for key in file.keys() if key.startswith(f"{case}.")]  # noqa: SIM118
        tensors = {key.split(".")[1]: file.get_tensor(key) for key in keys}
        return json.loads(file.metadata()[case]), tensors


@pytest.mark.parametrize(("name", "case"), list(cases()))
def test_a_strategy_gives_what_the_published_code_gives(name, case):
    parameters, given = read(name, case)
    grid, expected = tuple(parameters["grid"]), given.get("kept", given.get("survivors"))
    optional = {key: given[key] for key in ("saliency", "text") if key in given}
    tokens = VisualTokens.from_grid(given["features"], grid, **optional)
    options = OPTIONS[name](parameters)
    if name not in EXACT:
        options["keep_ratio"] = options.get("keep_ratio", len(expected) / tokens.num_tokens)
    strategy = get_strategy(name, **options)
    plan = strategy.plan(tokens)

    assert plan.survivors.tolist() == expected.tolist()
    if name in ROOTS:
        roots = torch.where(plan.target < 0, -1, plan.survivors[plan.target.clamp_min(0)])
        assert roots.tolist() == given["root"].tolist()
    if name in MERGED:
        merged = strategy.fuse(plan, tokens.features)
        torch.testing.assert_close(merged, given[MERGED[name]], atol=1e-4, rtol=1e-4)
    if "frame_order" in given:
        order = plan.frame_order if plan.frame_order is not None else torch.arange(grid[0])
        assert order.tolist() == given["frame_order"].tolist()
