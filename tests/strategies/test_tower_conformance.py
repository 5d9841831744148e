"""What every strategy that acts before or inside the vision tower holds to, in each form."""

from __future__ import annotations

from tokenfuse import get_strategy
from tokenfuse.registry import default_registry
from tokenfuse.strategies._stages import stages
from tokenfuse.testing import TowerStrategyConformance

FORMS = {
    "pixelprune": ({}, {"theta": -1.0}),
    "pixelprune anchored": ({"theta": 0.1}, {"theta": -1.0}),
    "earlytom": ({}, {"most_frames": 1}),
    "earlytom loose": ({"threshold": -1.0, "blocks": [3, 9, 18]}, None),
    "tome": ({"tower": True}, {"keep_ratio": 1.0}),
    "tome r": ({"tower": True, "r": 1}, None),
    "uniform": ({"vision_block": 0}, {"keep_ratio": 1.0}),
    "random": ({"vision_block": 2}, {"keep_ratio": 1.0}),
    "compose": ({"compose": ["pixelprune", {"strategy": "uniform", "vision_block": 1}]}, None),
}


def kit(form):
    name, (options, everything) = form.partition(" ")[0], FORMS[form]

    def make(self, **more):
        return get_strategy(name, **{**options, **more})

    members = {"make": make, "ratio": everything}
    return type(f"Test_{form.replace(' ', '_')}", (TowerStrategyConformance,), members)


for form in FORMS:
    globals()[f"Test_{form.replace(' ', '_')}"] = kit(form)


def test_every_built_in_strategy_that_acts_at_the_tower_is_here():
    there = {
        name
        for name, entry in default_registry().strategies.items()
        if "tower" in stages(entry.cls) and entry.distribution == "tokenfuse"
    }
    assert there == {form.partition(" ")[0] for form in FORMS}
