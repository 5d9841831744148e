"""What every strategy that acts inside the LLM holds to, in each of its forms."""

from __future__ import annotations

import pytest

from tokenfuse import get_strategy
from tokenfuse.errors import ConfigError
from tokenfuse.registry import default_registry
from tokenfuse.strategies._stages import stages
from tokenfuse.testing import LayerStrategyConformance

ONE = {"keep_ratio": 1.0}
ALL = {"keep_ratio": [1.0, 1.0, 1.0]}
FORMS = {
    "fastv": ({}, ONE),
    "pyramiddrop": ({}, ALL),
    "sparsevlm": ({}, ALL),
    "sparsevlm v2": ({"version": "v2"}, ALL),
    "sparsevlm video": ({"version": "video", "layers": 2, "keep_ratio": 1.0}, None),
    "vitcop": ({}, {"keep_ratio": [1.0, 1.0]}),
    "vitcop clusters": ({"clusters": 5}, {"keep_ratio": [1.0, 1.0]}),
    "framefusion": ({}, {"cost": 1.0}),
    "framefusion loose": ({"cost": 0.9, "threshold": 0.1}, None),
    "framefusion first": ({"link": "first"}, {"cost": 1.0}),
    "holitom inner": ({"inner_layer": 18}, {"inner_keep_ratio": 1.0}),
    "dart": ({"layer": 2}, ONE),
    "dart few pivots": ({"layer": 2, "image_pivots": 1, "text_pivots": 0}, ONE),
    "uniform": ({"layer": 1}, ONE),
    "random": ({"layer": 1}, ONE),
    "compose": ({"compose": [{"strategy": "fastv", "layer": 3}]}, None),
}


def kit(form):
    name, (options, everything) = form.partition(" ")[0], FORMS[form]

    def make(self, **more):
        return get_strategy(name, **{**options, **more})

    return type(
        f"Test_{form.replace(' ', '_')}",
        (LayerStrategyConformance,),
        {"make": make, "ratio": everything},
    )


for form in FORMS:
    globals()[f"Test_{form.replace(' ', '_')}"] = kit(form)


def test_every_built_in_strategy_that_acts_inside_is_here():
    inside = {
        name
        for name, entry in default_registry().strategies.items()
        if "llm" in stages(entry.cls) and entry.distribution == "tokenfuse"
    }
    # Its second stage is no cut: it has tests of its own.
    assert inside - {"dycoke"} == {form.partition(" ")[0] for form in FORMS}


SHARES = [0.3, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("layers", [4, 28, 36, 48])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "vitcop"])
@pytest.mark.parametrize("share", SHARES)
def test_a_share_is_what_layers_read_on_average(name, share, layers):
    strategy = get_strategy(name).at_share(share, layers)
    kept = strategy.keep_ratio if isinstance(strategy.keep_ratio, tuple) else (strategy.keep_ratio,)
    at = [cut.layer for cut in strategy.cuts()]
    assert at[-1] < layers
    left, read = 1.0, 0.0
    for layer in range(layers):
        if layer in at:
            left = kept[at.index(layer)]
        read += left
    assert read / layers == pytest.approx(share, abs=1e-6)


def test_a_share_that_earlier_layers_have_read_is_refused():
    with pytest.raises(ConfigError, match="read 71% of the tokens on average already"):
        get_strategy("uniform", layer=20).at_share(0.5, 28)
    with pytest.raises(ConfigError, match="expected each in its step"):
        get_strategy({"compose": ["ttf", "fastv"]}).at_share(0.5, 28)
